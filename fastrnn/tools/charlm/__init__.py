"""A character-level language model: the textbook's CharRNN, grown into a tool.

    errors      what goes wrong, said in one sentence
    files       reading of regular files, and of nothing else
    config      every option of a training run, checked in one place
    data        text -> vocabulary -> parallel streams of characters
    model       embedding -> recurrent layers -> linear decoder
    schedule    learning rate and early stopping, as functions of what was measured so far
    train       truncated backpropagation through time
    checkpoint  safetensors + json, written so that no moment of a crash can corrupt them
    sample      text, one character at a time
    compare     the same training with ``fastrnn`` and with ``torch.nn``, step for step
    plot        the loss curve as a picture
    report      what the user sees
    command     what ``fastrnn charlm`` does

Nothing is imported here: ``rich``, ``matplotlib`` and ``safetensors`` are an extra
(``pip install 'fastrnn[charlm]'``), and ``fastrnn`` works without them.
"""
