"""Values that turn everything on, so that whatever the chart can render is rendered in one go."""

from tests.support.chart import Object

PART: Object = {
    "nodeSelector": {"disk": "yes"},
    "tolerations": [{"key": "own", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "podAnnotations": {"for": "part"},
    "env": [{"name": "OWN", "value": "1"}],
}
"""What each part may have."""
GROUP: Object = {**PART, "runtimeClassName": "nvidia", "resources": {"requests": {"cpu": "2", "memory": "1Gi"}}}
DATABASE: Object = {key: value for key, value in PART.items() if key != "env"}
PODS: Object = {
    "labels": {"team": "ml"},
    "annotations": {"for": "all", "mesh": "off"},
    "env": [{"name": "SSL_CERT_FILE", "value": "/etc/own/ca.crt"}],
    "volumes": [{"name": "own", "configMap": {"name": "own"}}],
    "volumeMounts": [{"name": "own", "mountPath": "/etc/own", "readOnly": True}],
}
PEER: Object = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "own"}}}
EVERYTHING: Object = {
    "baseModel": "theirs",
    "catalog": {
        "another": {"hub": "org/another", "revision": "v1", "license": "MIT"},
        "ours": {"folder": "/models/ours", "license": "MIT"},
        "theirs": {"hub": "org/theirs", "revision": "v1", "license": "MIT"},
    },
    "pods": PODS,
    "serviceAccount": {"annotations": {"role": "own"}},
    "gateway": {**PART, "tlsSecret": "tls"},
    "orchestrator": PART,
    "training": {
        "head": PART,
        "workerGroups": {"cpu": GROUP, "gpu": {**GROUP, "enabled": True, "resources": {"limits": {"cpu": "4"}}}},
    },
    "inference": {
        "head": PART,
        "workers": {**GROUP, "gpus": 2, "labels": {"pool": "large"}},
        "replica": {"cpus": 1, "gpus": 0.5, "labelSelector": {"pool": "large"}},
        "pools": {"other": {"replicas": 2, "labelSelector": {"pool": "in(small, none)"}}},
        "workerGroups": {"small": {**GROUP, "gpus": 1, "labels": {"pool": "small"}}},
    },
    "mlflow": PART,
    "database": {"bundled": DATABASE},
    "ingress": {"className": "nginx", "http": {"enabled": True}, "grpc": {"enabled": True, "tlsSecret": "tls"}},
    "gatewayApi": {"parentRefs": [{"name": "a"}], "httpRoute": {"enabled": True}, "grpcRoute": {"enabled": True}},
    "networkPolicy": {
        "mlflowClients": [{"podSelector": {}}],
        "clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "dnsCidrs": ["169.254.20.10/32"],
        "extraEgress": {"mlflow": [{"to": [PEER], "ports": [{"port": 9000, "protocol": "TCP"}]}]},
    },
    "hub": {"existingTokenSecret": "hub", "endpoint": "https://mirror.internal:8443"},
}
"""With the bundled database and one volume; OUTSIDE of the tests of network policies has neither."""
