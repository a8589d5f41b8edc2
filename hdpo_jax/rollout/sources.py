"""Where a rollout's questions come from: a batch of prompts, or whoever asks while it runs."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from hdpo_jax.rollout.prompts import Intake, Question
from hdpo_jax.rollout.sampling import OwnSampling
from hdpo_jax.rollout.scheduler import Sampled
from hdpo_jax.types import Trajectory, Turn


class Listener(Protocol):
    """Who follows a trajectory while it is sampled. Called between rounds: answers at once."""

    @property
    def gone(self) -> bool:
        """Nobody listens any more: the trajectory is to end."""
        ...

    def sampled(self, new: Sampled) -> bool:
        """Hears of what was sampled; True: the trajectory is to end here."""
        ...

    def rewound(self, text: str) -> None:
        """Hears that the turn under way goes on from this text: a call in it was held back (`Gate`)."""
        ...

    def turned(self, turn: Turn) -> None:
        """Hears of a turn that has ended, the policy's or a tool's."""
        ...

    def finished(self, trajectory: Trajectory) -> None: ...


class Member(NamedTuple):
    """One trajectory that is to go on from a question."""

    identity: tuple[int, int, int]
    """All that its randomness depends on, beside the seed: step, prompt and sample number."""
    most: int
    """Tokens after the prompt, observations included."""
    own: OwnSampling | None = None
    listener: Listener | None = None


class Opening(NamedTuple):
    """A question, and the trajectories that are to go on from it."""

    question: Question
    group: int
    members: Sequence[Member]


class Source(Protocol):
    """What a rollout asks for more. Of its methods only `wait` may take time."""

    def __len__(self) -> int:
        """Openings that are there, or on their way."""
        ...

    @property
    def ended(self) -> bool:
        """There is no opening, and there will be none."""
        ...

    def wait(self) -> None:
        """Until there is an opening, or the source has ended; called where nothing is under way."""
        ...

    def pop(self) -> Opening | None:
        """The next; None: whoever asked has gone."""
        ...

    def finished(self, trajectory: Trajectory) -> None: ...

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those that have ended and were kept, in the order of prompts and samples."""
        ...

    def close(self) -> None: ...


class Batch:
    """The prompts of a step, `samples` trajectories each."""

    def __init__(
        self,
        intake: Intake,
        *,
        samples: int,
        step: int,
        numbers: Sequence[int],
        most: int,
        on_finished: Callable[[Trajectory], None] | None = None,
    ):
        """`numbers`: of each prompt in the step. `most`: tokens after the prompt."""
        self._intake = intake
        self._samples = samples
        self._step = step
        self._numbers = numbers
        self._most = most
        self._on_finished = on_finished
        self._finished: deque[Trajectory] = deque()

    def __len__(self) -> int:
        return len(self._intake)

    @property
    def ended(self) -> bool:
        return not self._intake

    def wait(self) -> None: ...

    def pop(self) -> Opening:
        place, question = self._intake.pop()
        group = self._numbers[place]
        members = [Member((self._step, group, sample), self._most) for sample in range(self._samples)]
        return Opening(question, group, members)

    def finished(self, trajectory: Trajectory) -> None:
        self._finished.append(trajectory)
        if self._on_finished:
            self._on_finished(trajectory)

    @property
    def trajectories(self) -> list[Trajectory]:
        return sorted(self._finished, key=lambda trajectory: (trajectory.group, trajectory.sample))

    def close(self) -> None:
        self._intake.close()
