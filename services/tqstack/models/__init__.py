"""Models: what their files tell (`ModelSpec`), what they will take (`Plan`), loaded (`Runtime`)."""
