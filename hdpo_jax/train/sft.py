"""The cold start: supervised learning of conversations, packed, resumable at any step."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from hdpo_jax.algorithm.state import TrainState, abstract_state, state_shardings
from hdpo_jax.algorithm.supervised import SupervisedBatch, make_sft_step
from hdpo_jax.config import SFTConfig
from hdpo_jax.data.conversations import Conversation, ConversationDataset
from hdpo_jax.data.encoding import EncodedConversation, encode_conversation
from hdpo_jax.data.pipeline import batches
from hdpo_jax.rollout.packing import Family, conversation_family, padding_share
from hdpo_jax.train.batching import RowBatcher
from hdpo_jax.train.loop import RunResult, train
from hdpo_jax.train.optimizer import make_optimizer
from hdpo_jax.train.policy import load_policy
from models.qwen3_vl.processing import Processor, load_image
from sharding.rules import shard_batch

FIGURES = {"loss/total": "loss", "optimizer/grad_norm": "grad norm"}


class ConversationEncoder:
    """Conversations -> segments to pack; encoded ones are kept while they fit `cache_mb` of host memory."""

    def __init__(self, processor: Processor, cache_mb: int):
        self._processor = processor
        self._room = cache_mb * 2**20
        self._kept: dict[str, EncodedConversation] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="encode")

    def __call__(self, conversations: Sequence[Conversation]) -> list[Family]:
        encoded = list(self._pool.map(self._encode, conversations))
        config = self._processor.config
        return [conversation_family(one.token_ids, one.learned, one.images, config) for one in encoded]

    def _encode(self, conversation: Conversation) -> EncodedConversation:
        kept = self._kept.get(conversation.id)
        if kept is not None:
            return kept
        images = [load_image(image) for image in conversation.images]
        encoded = encode_conversation(conversation.messages, images, self._processor)
        if encoded.nbytes <= self._room:
            self._room -= encoded.nbytes
            self._kept[conversation.id] = encoded
        return encoded


def train_sft(config: SFTConfig, *, title: str = "sft") -> RunResult:
    """Runs, or goes on with, the supervised run that `config` describes."""
    policy = load_policy(config.model, config.mesh)
    encode = ConversationEncoder(policy.processor, config.data.cache_mb)
    pack = RowBatcher(config.train, policy.model.config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, policy.params)
    shardings = state_shardings(abstract_state(policy.params, optimizer))
    learn = make_sft_step(policy.graphdef, optimizer, shardings=shardings)
    dataset = ConversationDataset(config.data.path, max_bad_rows=config.data.max_bad_rows)
    data = batches(dataset, batch_size=config.train.batch_size, seed=config.train.seed, workers=config.data.workers)

    def step(
        state: TrainState, conversations: Sequence[Conversation], number: int
    ) -> tuple[TrainState, Mapping[str, Any]]:
        rows, micro_batches = pack([encode(conversations)])
        padding = padding_share(rows)
        batch = SupervisedBatch(jax.tree.map(lambda leaf: leaf[0], rows), np.int32(micro_batches[0]))
        batch = batch._replace(rows=shard_batch(batch.rows, policy.mesh, axis=1))
        state, metrics = learn(state, batch)
        return state, jax.device_get(dict(metrics)) | {"rows/padding": padding}

    return train(config, policy, optimizer, data, step, title=title, figures=FIGURES)
