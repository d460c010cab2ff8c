"""Callbacks for training libraries; each needs its library (extras ``hf`` and ``lightning``)."""
