"""The web demo: a page with an image, a text and the boxes that belong to its words.

``uploads`` reads pictures of strangers, ``questions`` makes a query of a text field, ``turns`` lets
one prediction run at a time, ``examples`` has pictures to begin with, and ``app`` answers HTTP.
"""
