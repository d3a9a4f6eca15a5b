"""Text generation: each generated character is the next input of the model.

p = softmax(logits / temperature), cut to the top k;  next ~ p
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .data import Vocabulary
from .errors import TrainingError
from .model import CharRNN


def generate(
    model: CharRNN,
    vocabulary: Vocabulary,
    prime: str,
    length: int,
    temperature: float,
    generator: torch.Generator,
    top_k: int = 0,
) -> Iterator[str]:
    """Yields ``length`` characters that follow ``prime``, one by one.

    Unknown characters in the prime become the unknown symbol, which is never generated. The mode
    of the model (training or evaluation) is restored at the end.

    Args:
        model: the model.
        vocabulary: the characters of the model.
        prime: the preceding text. An empty prime stands for the start of a line.
        length: number of characters to generate.
        temperature: below 1 more predictable, above 1 more random; 0 takes the likeliest
            character.
        generator: CPU random numbers.
        top_k: draws from the k likeliest characters; 0 draws from all.
    """
    device = model.decoder.weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            state = model.zero_state(1)
            x = vocabulary.encode(prime or "\n").long().unsqueeze(1).to(device)  # [T,1]
            for _ in range(length):
                logits, state = model(x, state)
                number = draw(logits[-1, 0].float().cpu(), temperature, generator, top_k)
                yield vocabulary.decode([number])
                x = torch.full((1, 1), number, device=device)
    finally:
        model.train(was_training)


def draw(logits: Tensor, temperature: float, generator: torch.Generator, top_k: int = 0) -> int:
    """Draws the number of one character, never the unknown symbol.

    Args:
        logits: [V].
        temperature: as in `generate`.
        generator: CPU random numbers.
        top_k: as in `generate`.

    Raises:
        TrainingError: a logit is NaN or infinite.
    """
    if not logits.isfinite().all():
        raise TrainingError("the logits of the model contain NaN or infinity; train it again")
    known = logits.clone()
    known[Vocabulary.UNKNOWN] = -torch.inf
    if temperature == 0:
        return int(known.argmax())
    # The maximum is subtracted first and the divisor is limited to normal float32 numbers, because
    # 0 / 0 and -inf / inf would be NaN.
    limits = torch.finfo(known.dtype)
    known = (known - known.max()) / min(max(temperature, limits.tiny), limits.max)
    if 0 < top_k < known.numel():
        known[known < known.topk(top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(known.softmax(0), 1, generator=generator))
