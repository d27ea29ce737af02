"""The engine: which request runs next, in what memory, and what of it is kept (docs/engine.md)."""
