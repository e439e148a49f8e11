"""What a model is asked, by options (`source.py`), and which problems a step draws.

A step draws all in turn (`order.py`), or some more often than others (`curriculum.py`).
"""
