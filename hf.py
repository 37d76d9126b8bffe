"""Load and save Hugging Face folders: config.json, safetensors, generation_config.json.

Compatible with transformers and vLLM in both directions, without a conversion script.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from model import CausalLM, ModelConfig

CONVERT_GGUF = ("only safetensors are read: take the original model, or convert it "
                "(from_pretrained(gguf_file=...))")


def load_hf(folder_or_hub_id: str | Path, *, dtype=torch.float32, device="cpu",
            num_tokens: int = 0, wrap=None, compile=False) -> CausalLM:
    """Load a Hugging Face folder (or hub id), single or sharded safetensors, as a CausalLM in
    `dtype` on `device`.

    The model is built on the meta device and tensors are loaded one by one: peak host memory is one
    model. Only the EOS ids of generation_config.json are read, never penalties or top-k (trap 3).
    num_tokens: see ModelConfig. wrap(model) shards the model while its tensors are still on the
    meta device (parallel.shard): each rank then keeps only its shard of every tensor. compile: see
    CausalLM.compile_blocks. FileNotFoundError for absent files, ValueError for wrong contents, one
    line each."""
    folder = find_folder(folder_or_hub_id)
    config = ModelConfig.from_hf(_read_json(folder / "config.json"), num_tokens)
    if (folder / "generation_config.json").is_file():
        more = _read_json(folder / "generation_config.json").get("eos_token_id")
        eos = config.eos_token_id + ModelConfig(eos_token_id=more).eos_token_id
        config.eos_token_id = tuple(dict.fromkeys(eos))
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    if wrap is not None:
        wrap(model)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    expected = {name: tuple(p.shape) for name, p in parameters.items()}
    missing, tied = set(expected), config.tie_word_embeddings
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and tied:
                        # redundant tensors of some checkpoints: RoPE frequencies (old Llamas), a
                        # tied head (Qwen3-0.6B)
                        continue
                    _check_tensor(file, name, tuple(tensors.get_slice(name).get_shape()), expected)
                    tensor = tensors.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise ValueError(f"{name} in {file} is {tensor.dtype}: quantised; use the "
                                         "original weights")
                    if not tensor.isfinite().all():
                        raise ValueError(f"{name} in {file} holds NaN or inf; take an earlier "
                                         "checkpoint")
                    _fill(parameters[name], tensor)
                    missing.discard(name)
        except SafetensorError as e:
            raise ValueError(f"{file} is truncated or corrupt ({e}); copy it again") from None
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors ({', '.join(sorted(missing)[:3])}"
                         f"{', ...' if len(missing) > 3 else ''}); copy all of its safetensors "
                         "files")
    if compile:
        model.compile_blocks()
    return model


def save_hf(model: CausalLM, tokenizer, folder: str | Path, *,
            generation_config: dict | None = None, max_shard_bytes: int = 5 * 10**9,
            state_dict: dict | None = None) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load without a script. Not
    atomic: the caller renames the folder.

    tokenizer: saved with its chat template; None omits it. generation_config: overrides plain
    sampling. state_dict: the full weights, needed if the model's own tensors are FSDP shards."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()  # a stale index would take precedence over the new file
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # full FSDP state dicts list both tied tensors

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        # transformers rejects files without format metadata
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)

    special = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = model.config.to_hf() | special
    config["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    # Plain sampling with explicit values: transformers' default top_k is 50.
    plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
             "eos_token_id": config["eos_token_id"]}
    _write_json(folder / "generation_config.json", plain | special | (generation_config or {}))


@torch.no_grad()
def _fill(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Copy a full tensor into a parameter; into a sharded parameter only this rank's shard. No
    communication in either case."""
    if isinstance(parameter, DTensor):
        tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh,
                                   parameter.placements, src_data_rank=None)
    parameter.copy_(tensor)


def find_folder(folder_or_hub_id: str | Path) -> Path:
    """Return an existing folder as is; any other owner/name is downloaded from the hub."""
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if folder.is_file():
        fix = CONVERT_GGUF if folder.suffix == ".gguf" else ("pass the folder that holds "
                                                             "config.json and the weights")
        raise ValueError(f"{name} is a file; {fix}")
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise FileNotFoundError(f"model folder {name!r} does not exist; pass a folder or a hub "
                                    "id (owner/name)")
        from huggingface_hub import snapshot_download

        # weights and the tokenizer's files
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        # no network, no such repository, no permission; the hub's own message has many lines
        except Exception as e:
            raise FileNotFoundError(
                f"{name!r} is no folder here and the hub did not serve it ({type(e).__name__}); "
                "check the name and the network, or download the model elsewhere and pass its "
                "folder") from None
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Reject a LoRA adapter, a GGUF folder and a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is a LoRA adapter; merge it into its base model (peft: "
                         "merge_and_unload), save that, and pass its folder")
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            raise ValueError(f"{folder} holds GGUF files; " + CONVERT_GGUF)
        raise FileNotFoundError(f"{folder} has no config.json; pass --init_from=FOLDER in Hugging "
                                "Face's layout")


def _weight_files(folder: Path) -> list[Path]:
    """Paths of a folder's safetensors files; FileNotFoundError if one is missing."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks {file}; copy all of its files (only "
                                    "safetensors weights are read)")
    return [folder / file for file in files]


def _check_tensor(file: Path, name: str, shape: tuple, expected: dict[str, tuple]) -> None:
    if name not in expected:
        raise ValueError(f"{file} holds the unexpected tensor {name}; config.json must describe "
                         "the weights beside it")
    if shape != expected[name]:
        raise ValueError(f"{name} in {file} is {shape}, config.json implies {expected[name]}; use "
                         "its own config.json")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}); copy it again") from None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
