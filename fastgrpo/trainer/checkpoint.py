"""Checkpoints: written beside their place, flushed to the disk, then renamed: only whole ones are ever found."""

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastgrpo.checks import UserError

ADAPTER = "adapter_model.safetensors"


def save(folder, accelerator, model, tokenizer, state, limit=None):
    """``state``: what each rank needs besides model, optimiser and random numbers, which accelerate writes.
    ``limit``: older checkpoints are removed; None: kept."""
    folder, part = Path(folder), Path(f"{folder}.part")
    if accelerator.is_main_process:
        for left in folder.parent.glob("checkpoint-*.part"):  # by a kill
            shutil.rmtree(left)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(part)
    torch.save(state, part / f"trainer_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        describe(part, accelerator.unwrap_model(model), tokenizer)
        for path in [*part.rglob("*"), part]:
            flush(path)
        part.rename(folder)
        flush(folder.parent)
        for old in find_checkpoints(folder.parent)[:-limit] if limit else ():
            shutil.rmtree(old.rename(f"{old}.part"))  # a half-removed one is not found either
    accelerator.wait_for_everyone()


@contextmanager
def replacing(folder):
    """Yields where to write; then what was written takes the place of ``folder``, from which weights may be mapped."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def load(folder, accelerator, settings):
    """Restores model, optimiser and random numbers -> this rank's ``state``; says what it does, and which of the
    ``settings`` ({name: text}) are no longer the checkpoint's."""
    folder = Path(folder)
    ranks = len(list(folder.glob("trainer_*.pt")))
    if ranks != accelerator.num_processes:
        raise UserError(f"{folder} must be of {accelerator.num_processes} processes, got one of {ranks}")
    # map_location: a reference saved on a GPU is copied into the one there is, also where that has another number
    state = torch.load(folder / f"trainer_{accelerator.process_index}.pt", weights_only=True, map_location="cpu")
    accelerator.load_state(str(folder))
    accelerator.print(f"resuming from {folder.name} in {folder.parent}")
    before = state.get("settings", {})
    if changed := [f"{k} {before[k]} -> {new}" for k, new in settings.items() if before.get(k, new) != new]:
        accelerator.print(f"settings that differ from the checkpoint's: {', '.join(changed)}")
    return state


def find_checkpoints(output_dir):
    """Complete checkpoints, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]))


def start(config):
    """The checkpoint to go on from, or None."""
    output_dir, resume = config.output_dir, config.resume_from_checkpoint
    there = find_checkpoints(output_dir)
    if resume is True and not there:
        why = "" if config.save_strategy == "steps" else ", and save_strategy is 'no'"
        raise ValueError(f"resume_from_checkpoint needs a checkpoint: output_dir {output_dir} holds none{why}")
    if isinstance(resume, str) and not any(Path(resume).glob("trainer_*.pt")):
        raise ValueError(f"resume_from_checkpoint must be True or a checkpoint folder, got {resume!r}")
    if there and not resume:
        raise ValueError(
            f"output_dir {output_dir} holds checkpoints of an earlier run: resume it "
            "(resume_from_checkpoint=True, or --resume), or choose another"
        )
    if there and isinstance(resume, str) and Path(resume).resolve() != there[-1].resolve():  # their rows would mix
        raise ValueError(
            f"output_dir {output_dir} holds {there[-1].name}, newer than {resume}: remove it or take another"
        )
    return resume if isinstance(resume, str) else there[-1] if there else None


def describe(folder, model, tokenizer):
    """What ``from_pretrained`` wants to find beside the weights."""
    if hasattr(model, "peft_config"):
        model.peft_config[model.active_adapter].save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_only(accelerator):
    """Have accelerate save and load the trained adapter instead of the whole model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    def write(models, weights, folder):
        weights.clear()
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(models[0])
            state = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
            save_file({k: v.contiguous() for k, v in state.items()}, Path(folder) / ADAPTER)

    def read(models, folder):
        model = accelerator.unwrap_model(models.pop())
        set_peft_model_state_dict(model, load_file(Path(folder) / ADAPTER), adapter_name=model.active_adapter)

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def flush(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
