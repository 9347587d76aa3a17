"""A run in TensorBoard, read back by TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from rlhf_ray.rundir.board import Board, comparable


def test_numbers_spreads_answers_and_settings_are_there(tmp_path: Path) -> None:
    board = Board(tmp_path, {"seed": 1, "ppo": {"lr": 0.5, "stop": ["a"]}}, purge_step=None)
    board.scalars(1, {"loss": 2.5, "time/step": 9.0})
    board.scalars(2, {"loss": 1.5, "time/step": 9.0})
    board.histograms(2, {"lengths": torch.tensor([3, 3, 9])})
    board.answers(2, [{"score": 0.12345, "response": "a | *b*\nc"}])
    board.note(2, "look *here*")
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    (spread,) = events.Histograms("lengths")
    assert (spread.step, spread.histogram_value.num, spread.histogram_value.max) == (2, 3, 9)
    (text,) = events.Tensors("samples/text_summary")
    assert text.tensor_proto.string_val[0] == b"| score | response |\n| --- | --- |\n| 0.123 | a \\| \\*b\\* c |"
    (note,) = events.Tensors("notes/text_summary")
    assert (note.step, note.tensor_proto.string_val[0]) == (2, b"look *here*")
    kept = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(kept).session_start_info.hparams
    assert {name: value.WhichOneof("kind") for name, value in started.items()} == {
        "seed": "number_value",
        "ppo.lr": "number_value",
        "ppo.stop": "string_value",
    }
    shown = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    )
    assert [info.name.tag for info in shown.experiment.metric_infos] == ["loss"]


def test_settings_are_flattened_to_what_can_be_compared() -> None:
    assert comparable({"a": None, "b": {"c": True, "d": {"e": 1}}}) == {"a": "None", "b.c": True, "b.d.e": 1}
