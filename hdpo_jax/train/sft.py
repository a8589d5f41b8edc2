"""The cold start: supervised learning of conversations, packed, resumable at any step."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hdpo_jax.algorithm.state import TrainState, abstract_state, state_shardings
from hdpo_jax.algorithm.supervised import SupervisedBatch, make_sft_step
from hdpo_jax.config import SFTConfig
from hdpo_jax.data.conversations import Conversation, ConversationDataset
from hdpo_jax.data.encoding import EncodedConversation, encode_conversation
from hdpo_jax.data.kept import Kept
from hdpo_jax.rollout.packing import Family, RowShape, conversation_family, padding_share
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.loop import RunResult, host_batches, train
from hdpo_jax.train.optimizer import make_optimizer
from hdpo_jax.train.policy import load_policy
from models.policy import PolicyProcessor
from models.qwen3_vl.processing import load_image
from sharding.multihost import agree, together
from sharding.rules import shard_batch

FIGURES = {"loss/total": "loss", "optimizer/grad_norm": "grad norm"}


class ConversationEncoder:
    """Conversations -> segments to pack. Those already encoded are kept while they fit `cache_mb` of host memory."""

    def __init__(self, processor: PolicyProcessor, row: RowShape, cache_mb: int):
        self._processor = processor
        self._row = row
        self._kept: Kept[EncodedConversation] = Kept(cache_mb)

    def __call__(self, conversation: Conversation) -> Family:
        """Raises ValueError, one line, where the conversation does not fit a row."""
        one = self._kept.get(conversation.id, lambda: self._encode(conversation))
        family = conversation_family(one.token_ids, one.learned, one.images, self._processor.config)
        (segment,) = family.segments
        if segment.tokens > self._row.tokens or segment.patches > self._row.patches:
            raise ValueError(
                f"the conversation has {segment.tokens} tokens and {segment.patches} image patches; expected at most "
                f"train.row_tokens {self._row.tokens} and train.row_patches {self._row.patches}"
            )
        return family

    def _encode(self, conversation: Conversation) -> EncodedConversation:
        images = [load_image(image) for image in conversation.images]
        return encode_conversation(conversation.messages, images, conversation.videos, self._processor)

    def problem(self, conversation: Conversation) -> str | None:
        """Why the conversation can not be learned, in words; None where it can."""
        try:
            self(conversation)
        except ValueError as error:
            return str(error)
        return None


def train_sft(config: SFTConfig, *, title: str = "sft") -> RunResult:
    """Runs, or goes on with, the supervised run that `config` describes."""
    policy = load_policy(config.model, config.mesh, together=True)
    row = RowShape(config.train.row_tokens, config.train.row_patches)
    encode = ConversationEncoder(policy.processor, row, config.data.cache_mb)
    pack = RowBatcher(config.train, policy.model.config, patch_dtype=policy.model.dtype)
    optimizer = make_optimizer(config.optimizer, config.train.steps, policy.params)
    shardings = state_shardings(abstract_state(policy.params, optimizer))
    learn = make_sft_step(policy.graphdef, optimizer, shardings=shardings)
    dataset = ConversationDataset(config.data.path, max_bad_rows=config.data.max_bad_rows, problem=encode.problem)
    data = host_batches(dataset, config.train.batch_size, config)

    def step(
        state: TrainState, conversations: Sequence[Conversation], number: int
    ) -> tuple[TrainState, Mapping[str, Any]]:
        with together():
            families = [encode(conversation) for conversation in conversations]
        rows, micro_batches = pack([families])
        padding = float(agree(np.asarray(padding_share(rows, micro_batches))).mean())
        used: Any = np.int32(micro_batches[0])
        rows = shard_batch(jax.tree.map(lambda leaf: leaf[0], rows), policy.mesh, axis=1)
        batch = SupervisedBatch(rows, used)
        state, metrics = learn(state, batch)
        return state, jax.device_get(dict(metrics)) | {"rows/padding": padding}

    return train(config, policy, optimizer, data, step, title=title, figures=FIGURES)
