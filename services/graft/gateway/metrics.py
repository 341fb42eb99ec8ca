"""Prometheus metrics that both edges count into. `/metrics` on HTTP shows them."""

from prometheus_client import Counter, Histogram

REQUESTS = Counter("graft_gateway_requests_total", "Requests answered.", ["protocol", "method", "code"])
"""`code` is the name of a google.rpc.Code on gRPC and the status on HTTP."""

REQUEST_SECONDS = Histogram(
    "graft_gateway_request_seconds",
    "Time to answer; of a stream, to its last piece.",
    ["protocol", "method"],
    # Reads of the store take milliseconds, an answer of 128 tokens on a CPU some seconds, a watched job minutes.
    buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0),
)
