"""Which folder a model is in: a model folder itself, or the best (else the newest) checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import repository_path


def model_folder(path: str | Path, *, field: str = "policy") -> Path:
    """The Hugging Face folder that ``path`` means: itself, or the checkpoint that its ``best`` or ``latest`` names.

    Raises ValueError naming the field when there is none.
    """
    folder = repository_path(path)
    if (folder / "config.json").is_file():
        return folder
    for pointer in ("best", "latest"):
        if (folder / pointer).is_file():
            target = folder / (folder / pointer).read_text(encoding="utf-8").strip()
            if (target / "config.json").is_file():
                return target
    raise ValueError(
        f"{field} = {path}: no model there (neither config.json nor a complete checkpoint in {folder}); "
        "train it first, or name another folder"
    )


def has_model(path: str | Path) -> bool:
    """Whether ``model_folder`` would find a model."""
    try:
        model_folder(path)
    except ValueError:
        return False
    return True
