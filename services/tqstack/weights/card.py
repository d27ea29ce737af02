"""The model card of a converted model: what it is, how large, how near to its source."""

from __future__ import annotations

from pathlib import Path

from tqstack.weights.convert import Converted, Options

CARD = """\
---
library_name: mlx
tags: [mlx, tqstack]
---

# {name}, {bits:g} bits

Weights of `{name}` coded by `tqstack convert` ({how}).

| | |
|---|---|
| size | {size:.2f} GB |
| bits per coded weight, scales included | {coded_bits:.3f} |
| coded layers | {coded} |
| layers kept as they were | {kept} |
| KL divergence from the source | {divergence} |

```
tqstack generate {folder} "What is a KV cache?"
SIDECAR_MODEL={folder} tqstack up
```

In Python, `import tqstack.weights` teaches `mlx_lm.load` to read it.
"""


def write_card(
    destination: Path, name: str, options: Options, done: Converted, divergence: str
) -> None:
    """
    Args:
        name: of the source.
        divergence: as measured, in words.
    """
    how = f"{options.code}, {options.recipe} bits"
    how += ", calibrated" if options.calibration else ""
    how += ", with signs of the residual" if options.qjl else ""
    text = CARD.format(
        name=name,
        bits=options.bits,
        how=how,
        size=done.nbytes / 1e9,
        coded_bits=done.coded_bits,
        coded=done.recipe,
        kept=len(done.recipe.kept),
        divergence=divergence,
        folder=destination.name,
    )
    (destination / "README.md").write_text(text)
