"""The service on Ray Serve: jobs and HTTP in one place, pipelines as replicas on any machine of a cluster."""
