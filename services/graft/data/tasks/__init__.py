"""Tasks: how rows of named fields become prompts and completions, in training and in serving alike.

`builtin/*.yaml` are the definitions that Graft brings; `definition` reads one, `templates` renders it, `rows` makes
training rows of it, `catalog` finds it by name. None of them knows tokenizers, files of rows or who asks.
"""
