"""The reference of every identity test: transformers + PEFT generating one request alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

Stack = Sequence[tuple[str, float]]
TIE = 1e-4  # logits closer than this may swap by rounding
TIE_EVERY = 1000  # tokens; more near ties than that are no rounding


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy tokens, and for each the distance of the two best logits it was chosen from."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]


@dataclass(slots=True)
class Reference:
    """A base model folder and, by name, the LoRA folders that requests may use.

    A stack runs with all its adapters active, so PEFT adds each one's own delta. Its weighted
    concatenation (`combination_type="cat"`) takes use_rslora and layers_to_transform from the first
    adapter for all, and so is wrong for mixed ones.
    """

    model_path: Path
    loras: dict[str, Path]
    dtype: torch.dtype = torch.float32
    _model: Any = field(init=False)

    def __post_init__(self) -> None:
        base = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=self.dtype)
        base.train(False).requires_grad_(False)
        self._model = base
        for name, path in self.loras.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(path, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(base, path, adapter_name=name)

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        stack: Stack = (),
        eos_ids: frozenset[int] = frozenset(),
    ) -> Generated:
        """Greedy tokens (the end token included) of one prompt alone.

        stack: (name, scale) of each LoRA; eos_ids: tokens that end it, empty to ignore them.
        """
        ids, cache = torch.tensor([list(prompt)]), None
        tokens: list[int] = []
        gaps: list[float] = []
        with self._active(stack):
            while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_ids):
                output = self._model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
                best = output.logits[0, -1].float().topk(2)
                tokens.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
                ids = torch.tensor([tokens[-1:]])
        return Generated(tuple(tokens), tuple(gaps))

    def logits(self, tokens: Sequence[int], stack: Stack = ()) -> torch.Tensor:
        """[T, V] float32 logits after every token, in one pass without a cache."""
        with self._active(stack):
            output = self._model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def states(self, tokens: Sequence[int], stack: Stack = ()) -> torch.Tensor:
        """[T, H] states after the final norm, of every token, in one pass without a cache."""
        with self._active(stack):
            ids = torch.tensor([list(tokens)])
            output = self._model(input_ids=ids, use_cache=False, output_hidden_states=True)
        states: torch.Tensor = output.hidden_states[-1][0]
        return states

    def shortfalls(self, prompt: Sequence[int], tokens: Sequence[int], stack: Stack) -> list[float]:
        """How far the logit of each token of an output is below the best one at its place.

        The reference reads the output itself, so a near tie leaves the tokens after it comparable.
        """
        logits_TV = self.logits([*prompt, *tokens][:-1], stack)[len(prompt) - 1 :]
        chosen_T1 = logits_TV.gather(1, torch.tensor(tokens)[:, None])
        shortfalls: list[float] = (logits_TV.max(1).values - chosen_T1[:, 0]).tolist()
        return shortfalls

    @contextmanager
    def _active(self, stack: Stack) -> Iterator[None]:
        with torch.inference_mode(), ExitStack() as scope:
            if stack:
                self._model.base_model.set_adapter([name for name, _ in stack])
                scope.enter_context(self._scaled(stack))
            elif isinstance(self._model, PeftModel):
                scope.enter_context(self._model.disable_adapter())
            yield

    @contextmanager
    def _scaled(self, stack: Stack) -> Iterator[None]:
        """Each adapter's own scales times its scale in the stack."""
        layers = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            for name, scale in stack:
                if name in layer.scaling:
                    layer.scaling[name] *= scale
        yield
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def assert_greedy(
    reference: Reference, outputs: Iterable[tuple[Sequence[int], Stack, Sequence[int]]]
) -> None:
    """Every token of every output is the reference's, but for a few near ties.

    outputs: prompt, stack and tokens of each. A near tie is a token whose logit is within TIE of
    the best one. One is let pass, and one more for every TIE_EVERY tokens.
    """
    num_tokens, ties = 0, []
    for prompt, stack, tokens in outputs:
        assert tokens, "an empty output shows nothing"
        num_tokens += len(tokens)
        for index, short in enumerate(reference.shortfalls(prompt, tokens, stack)):
            where = f"token {index} of {list(tokens)} after {list(prompt)} with {stack}"
            assert short < TIE, f"{where}: {short} below the best"
            ties += [where] if short > 0 else []
    assert num_tokens, "no outputs"
    assert len(ties) <= 1 + num_tokens // TIE_EVERY, ties
