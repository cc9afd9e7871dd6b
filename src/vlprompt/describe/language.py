"""A local language model: asked about classes, and read for its prior about them.

Weights are read from safetensors alone, and no code that lies beside them is run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlprompt.documents import checksum
from vlprompt.errors import BackboneError, ConfigError, DataError, first_line, one_line
from vlprompt.prompting.prior import BIASES, FREQUENCIES, NEEDED, NORM, K, Past, decode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""How far our last layer may be from the model's own, as a share of its largest output."""


@dataclass(frozen=True)
class LanguageModel:
    """A Hugging Face causal language model in a folder."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    """SHA-256 over its configuration and some numbers of each tensor, which stands for it in unfinished work."""

    def prompt(self, question: str, class_name: str) -> Tensor:
        """Token ids [1, T] of a question about a class and the beginning of its answer."""
        asked = "In one sentence, " + question.replace("{}", class_name)
        text = f"{asked}\n"
        with_template = bool(getattr(self.tokenizer, "chat_template", None))
        if with_template:
            chat = [{"role": "user", "content": asked}]
            try:
                text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # whatever the template does
                raise BackboneError(f"the chat template of {self.name} fails: {one_line(first_line(error))}") from None
        text += ("" if text[-1:].isspace() else " ") + opening(class_name)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=not with_template).input_ids
        if (most := getattr(self.model.config, "max_position_embeddings", None)) and ids.shape[1] > most:
            raise DataError(f"question '{one_line(question, 60)}' of '{class_name}' is longer than {self.name} reads")
        return ids.to(self.model.device)

    @torch.inference_mode()
    def answer(self, question: str, class_name: str, max_tokens: int) -> str:
        """One sentence, by the most probable tokens; empty where the model has nothing to say."""
        ids = self.prompt(question, class_name)
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_tokens}
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sampling settings that a model's folder brings along
            found = self.model.generate(ids, **given, pad_token_id=0 if pad is None else pad)[0, ids.shape[1] :]
        said = " ".join(self.tokenizer.decode(found, skip_special_tokens=True).split())
        said = re.split(r"(?<=[.!?])\s", said)[0]
        return f"{opening(class_name)} {said}".strip() if any(c.isalnum() for c in said) else ""

    def decoder(self) -> Any:
        """The part with the layers; raises BackboneError, saying what differs, for a model that is not Llama-style."""
        inner = getattr(self.model, "model", None)
        layers = getattr(inner, "layers", None)
        if inner is None or layers is None or not hasattr(inner, "norm") or not hasattr(inner, "rotary_emb"):
            self.refuse("it has no model.layers, model.norm and model.rotary_emb")
        return inner

    def refuse(self, reason: str) -> NoReturn:
        """Raise BackboneError for a model whose last layer is none of Llama's."""
        kind = type(self.model).__name__
        raise BackboneError(f"{self.name} ({kind}) is not Llama-style: {reason} (allowed: Llama, Mistral, Qwen 2)")

    def layer(self) -> dict[str, Tensor]:
        """The last layer's tensors and the last norm, by their names, with the frequencies of the positions."""
        inner = self.decoder()
        own = {name: t.detach().cpu() for name, t in inner.layers[-1].state_dict().items()}
        own |= {NORM: inner.norm.weight.detach().cpu(), FREQUENCIES: inner.rotary_emb.inv_freq.detach().float().cpu()}
        if lacking := [name for name in NEEDED if name not in own]:
            self.refuse(f"its last layer has no {lacking[0]}")
        if more := sorted(set(own) - {*NEEDED, *BIASES}):
            self.refuse(f"its last layer has {more[0]} too")
        return own

    @property
    def numbers(self) -> tuple[float, float]:
        """What the norms add to the variance, and what positions are scaled by."""
        inner = self.decoder()
        if (eps := getattr(inner.norm, "variance_epsilon", None)) is None:
            self.refuse(f"its norm is a {type(inner.norm).__name__}")
        return float(eps), float(getattr(inner.rotary_emb, "attention_scaling", 1.0))

    @torch.inference_mode()
    def past(self, questions: Sequence[str], class_name: str) -> Past:
        """Keys and values [Q, G, T, d] of the last layer for questions about a class, and their lengths [Q]."""
        seen = [self.model(self.prompt(q, class_name), use_cache=True).past_key_values.layers[-1] for q in questions]
        keys, values = ([getattr(x, what)[0].transpose(0, 1).cpu() for x in seen] for what in ("keys", "values"))
        lengths = torch.tensor([len(x) for x in keys])
        return Past(_together(keys), _together(values), lengths)

    @torch.inference_mode()
    def check(self, layer: dict[str, Tensor], question: str, class_name: str) -> None:
        """Raise BackboneError unless our computation of the last layer is the model's own, on a question."""
        ids, (eps, scaling) = self.prompt(question, class_name), self.numbers
        seen: list[Tensor] = []
        inner = self.decoder()

        def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        hook = inner.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            expected = inner(ids, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        x, d = seen[0], 2 * len(layer[FREQUENCIES])
        here = {name: t.to(x.device, torch.float32 if name == FREQUENCIES else x.dtype) for name, t in layer.items()}
        try:
            none = x.new_zeros(1, layer[K].shape[0] // d, 0, d)
            found = decode(x, here, Past(none, none, torch.zeros(1, dtype=torch.long, device=x.device)), eps, scaling)
            apart = ((found - expected).abs().max() / expected.abs().max()).item()
        except RuntimeError as error:
            self.refuse(one_line(error, 80))
        if not apart <= TOLERANCE[x.dtype]:
            self.refuse(f"its last layer gives something else, by {apart:.2g} of the largest output")


def _together(pasts: list[Tensor]) -> Tensor:
    """[T, G, d] each, padded at the end: [Q, G, T, d]."""
    return pad_sequence(pasts, batch_first=True).transpose(1, 2).contiguous()


def opening(class_name: str) -> str:
    """How the model's answer begins."""
    return f"The {class_name} appears as"


def load_language_model(folder: Path, device: str, precision: str) -> LanguageModel:
    """Load a causal language model and its tokenizer from a folder; raises ConfigError without ``transformers``.

    Raises BackboneError for a folder that holds none, or whose weights are not safetensors.
    """
    if find_spec("transformers") is None:
        raise ConfigError("a language model needs transformers: pip install 'vlprompt[describe]'")
    folder = folder.expanduser()
    if not (folder / "config.json").is_file():
        raise BackboneError(f"no language model in {folder}: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        other = next((f.name for kind in ("*.bin", "*.pt", "*.pth") for f in sorted(folder.glob(kind))), None)
        reason = f"; {other} is not read, as it may hold code" if other else ""
        raise BackboneError(f"no weights in {folder}: it has no .safetensors{reason}")
    if precision not in DTYPES:
        raise ConfigError(f"precision = {precision} (allowed: {', '.join(DTYPES)})")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=DTYPES[precision], attn_implementation="sdpa", **local
            )
            model = model.to(device).eval().requires_grad_(False)
    except MemoryError:
        raise
    except Exception as error:  # the library lets errors of many kinds through
        raise BackboneError(f"cannot load the language model in {folder}: {one_line(first_line(error))}") from None
    some = [(name, p.flatten()[:64].tolist()) for name, p in model.named_parameters()]
    fingerprint = checksum([model.config.to_json_string(), some])
    return LanguageModel(folder.resolve().name, model, tokenizer, fingerprint)
