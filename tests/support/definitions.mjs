// What the definitions of Gateway API and of Prometheus' operator say against objects: a JSON list of them on standard
// input, a JSON list of faults on standard output. The argument is the folder that deploy/setup/definitions makes.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const packages = pathToFileURL(`${process.argv[2]}/node_modules/@kubernetes-models/`);
const VALIDATORS = {
  "gateway.networking.k8s.io/v1": "gateway-api/_schemas/IoK8sSigsGatewayApiApisV1",
  "monitoring.coreos.com/v1":
    "prometheus-operator/_schemas/ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1",
};

// A validator says nothing of a field that it does not know, and never reads it: what nobody has read is a fault.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const inner = Array.isArray(value) ? [] : {};
  for (const [key, item] of Object.entries(value)) {
    if (!Array.isArray(value)) unread.add(`${path}/${key}`);
    inner[key] = watched(item, `${path}/${key}`, unread);
  }
  return new Proxy(inner, {
    get(target, key) {
      unread.delete(`${path}/${String(key)}`);
      return target[key];
    },
  });
}

const faults = [];
for (const one of JSON.parse(readFileSync(0, "utf8"))) {
  const { validate } = await import(new URL(`${VALIDATORS[one.apiVersion]}${one.kind}.js`, packages));
  const unread = new Set();
  validate(watched(one, "", unread));
  const name = `${one.kind} ${one.metadata.name}`;
  for (const { instancePath, keyword, params } of validate.errors ?? [])
    faults.push(`${name} ${instancePath}: ${keyword} ${JSON.stringify(params)}`);
  for (const path of unread) faults.push(`${name} ${path}: unknown`);
}
console.log(JSON.stringify(faults));
