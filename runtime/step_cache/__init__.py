"""Step caching: sampling steps whose velocity is reused from earlier ones instead of being computed.

``settings`` says what a request asks for, ``criteria`` decides which steps, ``cached_step`` wraps a step function;
``ratios`` and ``rescaling`` hold what MagCache and TeaCache know of a checkpoint beforehand, and ``measure`` finds out.
"""
