"""Tests of `deploy/`: what is there is linted, and its commands are run without a container engine."""
