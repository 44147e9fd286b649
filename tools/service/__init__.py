"""The video service: a durable queue of jobs behind HTTP, on top of ``runtime.scheduling``.

``application.create_application`` is the way in, ``reelforge serve`` the command. Nothing of the sampling is here.
"""
