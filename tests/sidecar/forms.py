"""What tests of forms and of forced calls share."""

from __future__ import annotations

import numpy as np

ASKED = [{"role": "user", "content": "hi"}]
# Schemas that cannot be forced, and what the refusal tells.
REFUSED = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems cannot be forced; take it out"),
    ({"not": {"type": "string"}}, "not cannot be forced; take it out"),
    ({"type": "object", "propertyNames": {"pattern": "x"}}, "propertyNames cannot be forced; take"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf .* write anyOf"),
    ({"type": "object", "minProperties": 2}, "minProperties 2 cannot be forced; name as many"),
    ({"type": "string", "format": "odd"}, "format odd is not known; take a pattern"),
    ({"type": "string", "pattern": "(?=a)b"}, "cannot look around .* write it without"),
    ({"type": "string", "pattern": "a("}, "not valid .unclosed group.; mend it"),
    ({"$ref": "#/$defs/own"}, "#/.defs/own leads nowhere; add what it names"),
    ({"$ref": "http://127.0.0.1/x"}, "put what it names under .defs"),
    ({"enum": []}, "no value meets this schema .*; loosen it"),
    ({"type": "strng"}, "strng is none of JSON's; write string"),
]


def walk(grammars, tokenizer, grammar, rng, most=400):
    """Tokens of an answer drawn evenly from what the grammar allows; None: it did not end."""
    form, tokens = grammars.form(grammar), []
    while len(tokens) < most:
        mask = form.allowed(len(tokenizer))
        ids = np.flatnonzero(mask)
        ends = [token for token in tokenizer.eos_token_ids if mask[token]]
        tokens.append(ends[0] if ends and rng.random() < 0.5 else int(rng.choice(ids)))
        if tokens[-1] in tokenizer.eos_token_ids:
            return tokens[:-1]
        form.take(tokens[-1])
    return None
