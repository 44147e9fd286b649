"""Many requests, few pipelines: a bounded, fair queue in front of one pipeline per device.

``pool.PipelinePool`` is the way in. Nothing of the sampling is here: pipelines are given the requests, and the events
that they yield are handed on.
"""
