"""Random forwards: loops, options, lists, splits, item assignment, in-place arithmetic, methods, flags, outputs."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.collapse.models import trained

# One statement each, of a new value {v} from the earlier values {a} and {b}, convolutions {c}, {d} and a norm {n}.
_STATEMENTS = (
    "{v} = self.{c}({a})",
    "{v} = self.{n}(self.{c}({a}))",
    "{v} = self.{c}({a}) + self.{d}({a})",
    "{v} = {a}\n    for part in self.sequence: {v} = part({v})",
    "{v} = self.{n}(self.{c}({a}))\n    if flag: {v} = {v} * 2",
    "{v} = self.{c}({a}) if flag else self.{n}(self.{c}({a}))",
    "{v} = self.{c}({a}).clone()\n    {v}[:, :2] = {b}[:, :2]",
    "{v} = self.{c}({a})\n    {v} += {b}",
    "pair = [self.{c}({a}), {b}]\n    pair[0] = self.{n}(pair[0])\n    {v} = pair[0] + pair[1]",
    "{v} = self.{n}(self.encode({a}))",
    "{v} = self.{n}(self.{c}({a})) if self.switch else self.{c}({a})",
    "{v} = self.{c}({a})\n    {v} = self.{n}({v}) if mode == 'a' else torch.relu({v})",
    "{v} = torch.relu({a})",
    "{v} = self.{n}(self.{c}({a})) if {a}.shape[-1] < 20 else self.{c}({a})",
    "{v} = torch.cat(list(self.{c}({a}).chunk(2, 1))[::-1], 1)",
    "{v} = F.relu(self.{n}(self.{c}({a})), inplace=True)",
    "{v} = self.{c}({a}) * float({a}.mean() > 0)",
    "{v} = sum([self.{c}({a}), self.{d}({a}), {b}])",
    "{v} = F.dropout(self.{n}(self.{c}({a})), 0.5, self.training)",
    "{v} = self.block({a}, flag)",
    "one, two = self.wide({a}).split([4, 3], 1)\n    {v} = self.{n}(one) + two.mean()",
    "wide = self.wide({a})\n    {v} = torch.cat([self.few(wide[:, :2]).relu(), wide[:, 5:].tanh()], 1)",
    "{v} = self.{n}(self.wide({a})[:, ::2]) + {b}",
    "pair = torch.cat([self.thin({a}), self.even({b})], 1)\n    {v} = torch.relu(self.{n}(pair))",
    "{v} = torch.relu(self.{n}(self.{c}({a}) + self.{d}({b})))",
    "unread = self.{n}(self.{c}({a}))\n    {v} = self.{d}({b})",
    "unread = self.block({a})\n    {v} = {b} + 1",
    "aside = self.wide({a})\n    {v} = {b} if flag else {b} * 2\n    if mode == 'b': {v} = {v} + aside[:, :4]",
)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        x = self.conv(x)
        return x if plain else self.norm(x)


def random_model(seed: int) -> tuple[nn.Module, str]:
    """Return a model in eval mode and float64 that takes four channels, and the code of its forward."""
    rng = random.Random(seed)
    names, lines = ["x"], []
    for number in range(rng.randint(2, 6)):
        value = f"v{number}"
        # Mostly of the last value, so that not too much is without effect on the result.
        a, b = rng.choice((names[-1], names[-1], rng.choice(names))), rng.choice(names)
        choices = {"v": value, "a": a, "b": b, "n": rng.choice(("t", "u", "w"))}
        convs = dict(zip("cd", rng.sample("pqrs", 2), strict=True))
        lines.append(rng.choice(_STATEMENTS).format(**choices, **convs))
        names.append(value)
    last, other = names[-1], rng.choice(names)
    result = rng.choice((last, f"({last}, {other})", f"{{'out': {last}, 'more': [{other}]}}"))
    code = "def forward(self, x, flag=False, mode='a'):\n    " + "\n    ".join([*lines, f"return {result}"])
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(code, namespace)
    methods = {"forward": namespace["forward"], "encode": lambda self, x: self.p(x)}
    model: Any = type("Random", (nn.Module,), methods)()
    for name in "pqrs":
        model.add_module(name, nn.Conv2d(4, 4, rng.choice((1, 3)), padding="same", bias=rng.random() < 0.5))
    for name in "tuw":
        model.add_module(name, nn.BatchNorm2d(4))
    model.sequence = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()])
    model.wide, model.thin = nn.Conv2d(4, 7, 3, padding=1), nn.Conv2d(4, 2, 1)
    model.even = nn.Conv2d(4, 2, 3, padding=1)
    model.few = nn.BatchNorm2d(2)
    model.block = _Block()
    model.switch = rng.random() < 0.5
    return trained(model), code
