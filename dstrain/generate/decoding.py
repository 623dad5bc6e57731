"""How the next token is chosen. Imports nothing heavy: wrong values are refused before torch is imported."""

from dataclasses import dataclass, replace
from typing import Any

from dstrain.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Greedy, unless one of temperature, top_p (a share) and top_k (a number of tokens) asks for draws; num_beams > 1
    searches for the likeliest text instead."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1

    def __post_init__(self):
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max_new_tokens is {self.max_new_tokens}: write a positive number")
        if self.num_beams < 1:
            problems.append(f"--num_beams is {self.num_beams}: write a positive number")
        if self.temperature is not None and self.temperature <= 0:
            problems.append(f"--temperature is {self.temperature}: write a positive number, or leave it out for greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top_p is {self.top_p}: write a share, above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top_k is {self.top_k}: write a positive number of tokens")
        if problems:
            raise UserError(problems)

    @property
    def draws(self) -> bool:
        return (self.temperature, self.top_p, self.top_k) != (None, None, None)

    @classmethod
    def asked_for(cls, max_new_tokens: int | None, **choices: Any) -> "Decoding":
        """As flags say: those that are None have their defaults."""
        given = {"max_new_tokens": max_new_tokens, **choices}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def at_most_half(self, max_length: int | None) -> "Decoding":
        """With no more new tokens than leave as many for a prompt."""
        return self if max_length is None else replace(self, max_new_tokens=min(self.max_new_tokens, max_length // 2))
