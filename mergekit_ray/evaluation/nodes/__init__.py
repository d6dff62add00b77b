"""Nodes evaluate expressions: one class for each kind.

A kind defined in ``core/expressions/x.py`` is evaluated by a class in ``evaluation/nodes/x.py``, which is imported when
the first of that kind is met: what a plan does not use (compiled loops, say) costs no time.
"""
