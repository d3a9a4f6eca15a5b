"""A character-level language model: a textbook CharRNN as a command line tool.

    errors        exceptions with one-line messages
    files         reading of regular files
    config        every option of a training run, checked in one place
    data          text -> vocabulary -> parallel streams of characters
    model         embedding -> recurrent layers -> linear decoder
    schedule      learning rate and early stopping, as pure functions of the losses so far
    train         truncated backpropagation through time
    checkpoint    safetensors + json, crash-safe
    sample        text generation, one character at a time
    activations   states and gates of a model at every character of a text
    features      simple features of a text, and which units follow them
    page          both as a page for a browser (page.html)
    side_by_side  the same training with ``fastrnn`` and with ``torch.nn``, step by step
    plot          the loss curve as a PNG
    report        progress output
    fit           the training loop: train, evaluate, save, sample
    interrupt     Ctrl-C and SIGTERM between two steps
    command       the command line ``fastrnn charlm``

This package imports nothing here. ``rich``, ``matplotlib`` and ``safetensors`` are an optional
extra (``pip install 'fastrnn[charlm]'``), and ``fastrnn`` works without them.
"""
