"""The methods: what each learns from, and its loss. One loop runs all of them (`graft.training.loop`)."""
