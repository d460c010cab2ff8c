"""Random calls of the public surface: a right number, a flag, or one clear refusal.

A situation is a function of its seed: a model, a loss, a precision, a wrapper, a mode and one piece
of the library (:mod:`surface.situations`). The piece is called and held against naive loops in
float64 (:mod:`surface.pieces`, :mod:`surface.paths`, :mod:`surface.twins`), and what came of it is
classified (:mod:`surface.outcomes`).
"""
