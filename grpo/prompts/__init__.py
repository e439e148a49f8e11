"""Which problems a step draws: all in turn (`order.py`), or some more often than others (`curriculum.py`)."""
