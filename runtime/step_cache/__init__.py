"""Step caching: sampling steps whose velocity is reused from earlier ones instead of being computed.

``settings`` says what a request asks for, ``criteria`` decides which steps, ``cached_step`` wraps a step function, and
``ratios`` holds what MagCache knows of a checkpoint beforehand.
"""
