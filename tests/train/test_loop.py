"""What the loop does around its steps."""

import dataclasses
import json
import logging
from dataclasses import replace

from configs import signs_sft
from hdpo_jax.train.loop import _remember_config


def test_settings_that_changed_since_the_last_start_are_named(tmp_path, caplog):
    config = signs_sft.get_config()
    _remember_config(tmp_path, config)
    with caplog.at_level(logging.WARNING):
        _remember_config(tmp_path, config)
        assert caplog.messages == []
        changed = replace(config, train=replace(config.train, steps=7))
        _remember_config(tmp_path, changed)
    assert caplog.messages == ["going on with train.steps 7; it was 100 so far"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 7
    assert json.loads(json.dumps(dataclasses.asdict(changed))) == json.loads((tmp_path / "config.json").read_text())
