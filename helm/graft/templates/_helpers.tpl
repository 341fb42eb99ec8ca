{{/* Names are cut to 30 characters, with a digest of the whole so that they stay apart: KubeRay adds suffixes of up to 33
and a Service's name ends at 63. Names of releases may have dots, those of Services not. */}}
{{- define "graft.fullname" -}}
{{- $name := .Release.Name }}
{{- if .Values.fullnameOverride }}{{ $name = .Values.fullnameOverride }}
{{- else if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" $name .Chart.Name }}
{{- end }}
{{- $name = replace "." "-" $name }}
{{- if gt (len $name) 30 }}{{ $name = printf "%s-%s" ($name | trunc 23 | trimSuffix "-") ($name | sha256sum | trunc 6) }}{{ end }}
{{- $name }}
{{- end }}

{{/* All labels of pods, and what selects them: they never change within a release, so that a chart's version alone replaces
no pod. Without app.kubernetes.io/name, by which KubeRay's Services find heads. Called with (list $ component). */}}
{{- define "graft.selector" -}}
app.kubernetes.io/part-of: graft
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "graft.match" -}}
{{- dict "matchLabels" (include "graft.selector" . | fromYaml) | toJson }}
{{- end }}

{{- define "graft.labels" -}}
{{ include "graft.selector" . }}
app.kubernetes.io/name: graft
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{/* Labels and annotations of a pod, the chart's own before a part's before those of all: (list $ component part own). */}}
{{- define "graft.podMetadata" -}}
{{- $ := index . 0 }}
labels: {{- merge (include "graft.selector" . | fromYaml) $.Values.pods.labels | toYaml | nindent 2 }}
{{- with merge (index . 3) ((index . 2).podAnnotations | default dict) $.Values.pods.annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Variables of a part and of all, after the chart's own: (list $ part). */}}
{{- define "graft.moreEnv" -}}
{{- with concat (index . 0).Values.pods.env ((index . 1).env | default list) }}{{ toYaml . }}{{ end }}
{{- end }}

{{/* Volumes of all pods, and where they are mounted. */}}
{{- define "graft.moreVolumes" -}}
{{- with .Values.pods.volumes }}{{ toYaml . }}{{ end }}
{{- end }}
{{- define "graft.moreMounts" -}}
{{- with .Values.pods.volumeMounts }}{{ toYaml . }}{{ end }}
{{- end }}

{{/* An image by digest, else by tag, else by the chart's version. Called with (list $ image). */}}
{{- define "graft.image" -}}
{{- $image := index . 1 -}}
{{- $registry := (index . 0).Values.images.registry -}}
{{- if $registry }}{{ trimSuffix "/" $registry }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "graft.baseModel" -}}
{{- required "baseModel is not set: name the base model that is served and fine-tuned, for example --set baseModel=smollm2-135m" .Values.baseModel -}}
{{- end }}

{{/* The Secrets' names: a given one, or the chart's own. */}}
{{- define "graft.databaseSecret" -}}
{{- if not .Values.database.existingSecret }}{{ include "graft.fullname" . }}-database{{ else }}{{ .Values.database.existingSecret }}{{ end }}
{{- end }}
{{- define "graft.raySecret" -}}
{{- .Values.ray.existingTokenSecret | default (printf "%s-ray-token" (include "graft.fullname" .)) }}
{{- end }}
{{- define "graft.mlflowSecret" -}}
{{- .Values.mlflow.auth.existingSecret | default (printf "%s-mlflow" (include "graft.fullname" .)) }}
{{- end }}
{{- define "graft.apiKeySecret" -}}
{{- .Values.gateway.existingApiKeySecret | default (printf "%s-api-key" (include "graft.fullname" .)) }}
{{- end }}

{{- define "graft.engineSecret" -}}
{{- .Values.inference.existingTokenSecret | default (printf "%s-engine-token" (include "graft.fullname" .)) }}
{{- end }}

{{- define "graft.mlflowUri" -}}
http://{{ include "graft.fullname" . }}-mlflow:5000
{{- end }}

{{/* A value of the release's Secret that is kept over upgrades. Called with (list $ secret key length). */}}
{{- define "graft.kept" -}}
{{- $held := (lookup "v1" "Secret" (index . 0).Release.Namespace (index . 1)) | default dict -}}
{{- with get (get $held "data" | default dict) (index . 2) }}{{ . | b64dec }}{{ else }}{{ randAlphaNum (int (index . 3)) }}{{ end }}
{{- end }}

{{- define "graft.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "graft.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Where a pod may be placed, and what goes before what. Called with the component's values. */}}
{{- define "graft.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "graft.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Spreads replicas over nodes. Called with (list $ component). */}}
{{- define "graft.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {{ include "graft.match" . }}
{{- end }}

{{/* Variables of every process of Graft. HOME is apart from GRAFT_HOME, which pods may share. */}}
{{- define "graft.env" -}}
- {name: GRAFT_HOME, value: /var/lib/graft}
- {name: GRAFT_CONFIG, value: /etc/graft/graft.yaml}
- {name: HOME, value: /tmp}
{{- include "graft.storageEnv" . }}
{{- end }}

{{- define "graft.storageEnv" }}
{{- if eq .Values.storage.kind "s3" }}
{{- with .Values.storage.s3.region }}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- with .Values.storage.s3.existingSecret }}
- {name: AWS_ACCESS_KEY_ID, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: access-key-id}}}
- {name: AWS_SECRET_ACCESS_KEY, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: secret-access-key}}}
{{- end }}
{{- end }}
{{- end }}

{{- define "graft.storeEnv" -}}
- {name: GRAFT_STORE_URL, valueFrom: {secretKeyRef: {name: {{ include "graft.databaseSecret" . | quote }}, key: store-url}}}
{{- end }}

{{- define "graft.mlflowEnv" -}}
{{- if .Values.mlflow.auth.enabled }}
- {name: MLFLOW_TRACKING_USERNAME, valueFrom: {secretKeyRef: {name: {{ include "graft.mlflowSecret" . | quote }}, key: username}}}
- {name: MLFLOW_TRACKING_PASSWORD, valueFrom: {secretKeyRef: {name: {{ include "graft.mlflowSecret" . | quote }}, key: password}}}
{{- end }}
{{- end }}

{{/* The state's mounts. Called with (list $ hasCatalogue); `run` is a pod's own, as its pid file is. */}}
{{- define "graft.stateMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: state, mountPath: /var/lib/graft}
- {name: run, mountPath: /var/lib/graft/run}
{{- if .Values.catalog }}
- {name: catalog, mountPath: /var/lib/graft/base_models.yaml, subPath: base_models.yaml, readOnly: true}
{{- end }}
{{- with include "graft.moreMounts" . }}
{{ . }}
{{- end }}
{{- end }}

{{- define "graft.stateVolumes" -}}
- {name: tmp, emptyDir: {}}
- {name: run, emptyDir: {}}
- name: state
{{- if eq .Values.storage.kind "pvc" }}
  persistentVolumeClaim: {claimName: {{ .Values.storage.pvc.existingClaim | default (printf "%s-state" (include "graft.fullname" .)) | quote }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.storage.s3.cacheSize }}}
{{- end }}
{{- if .Values.catalog }}
- name: catalog
  configMap: {name: {{ include "graft.fullname" . }}-catalog}
{{- end }}
{{- with include "graft.moreVolumes" . }}
{{ . }}
{{- end }}
{{- end }}

{{/* Sections of graft.yaml that more than one process has. */}}
{{- define "graft.sharedSettings" -}}
{{- $settings := dict "serving" (include "graft.serving" . | fromYaml) }}
{{- if eq .Values.storage.kind "s3" }}
{{- $storage := dict "url" .Values.storage.s3.url }}
{{- with .Values.storage.s3.endpointUrl }}{{ $_ := set $storage "endpoint_url" . }}{{ end }}
{{- $_ := set $settings "storage" $storage }}
{{- end }}
{{- toYaml $settings }}
{{- end }}

{{/* The internal gRPC's token: of those that ask it and of those that answer. */}}
{{- define "graft.engineTokenMount" -}}
- {name: engine-token, mountPath: /etc/graft-engine, readOnly: true}
{{- end }}

{{- define "graft.engineTokenVolume" -}}
- name: engine-token
  secret: {secretName: {{ include "graft.engineSecret" . | quote }}, items: [{key: token, path: token}]}
{{- end }}

{{- define "graft.serving" -}}
address: {{ include "graft.fullname" . }}-inference:9000
token_file: /etc/graft-engine/token
base_model: {{ include "graft.baseModel" . | quote }}
max_loras: {{ .Values.inference.maxLoras }}
max_cpu_loras: {{ .Values.inference.maxCpuLoras }}
max_lora_rank: {{ .Values.inference.maxLoraRank }}
context_tokens: {{ .Values.inference.contextTokens }}
kv_cache_gib: {{ .Values.inference.kvCacheGib }}
max_num_seqs: {{ .Values.inference.maxNumSeqs }}
num_replicas: {{ .Values.inference.replicas }}
dtype: {{ .Values.inference.dtype }}
{{- $replica := .Values.inference.replica }}
replica:
  cpus: {{ $replica.cpus }}
  gpus: {{ include "graft.replicaGpus" . }}
  label_selector: {{- $replica.labelSelector | toYaml | nindent 4 }}
pools: {{- include "graft.pools" .Values.inference.pools | nindent 2 }}
{{- end }}

{{/* What base models ask of nodes, in the words of graft.yaml. Called with the pools of training or inference. */}}
{{- define "graft.pools" -}}
{{- $words := dict "replicas" "num_replicas" "labelSelector" "label_selector" }}
{{- $pools := dict }}
{{- range $base, $asked := . }}
{{- $pool := dict }}
{{- range $name, $value := $asked }}{{ $_ := set $pool (get $words $name | default $name) $value }}{{ end }}
{{- $_ := set $pools $base $pool }}
{{- end }}
{{- toYaml $pools }}
{{- end }}

{{/* Where jobs train, as the section `training` of graft.yaml. */}}
{{- define "graft.training" -}}
quantized_base: {{ .Values.training.quantizedBase }}
nodes_wait_seconds: {{ .Values.training.nodesWaitSeconds }}
worker: {{- get (include "graft.pools" (dict "worker" (merge (dict "gpus" (include "graft.workerGpus" . | float64)) .Values.training.worker)) | fromYaml) "worker" | toYaml | nindent 2 }}
pools: {{- include "graft.pools" .Values.training.pools | nindent 2 }}
worker_groups:
  {{- range $group, $worker := .Values.training.workerGroups }}
  {{- if $worker.enabled }}
  {{ $group | quote }}:
    max_nodes: {{ $worker.maxReplicas }}
    cpus: {{ include "graft.cpus" $worker }}
    gpus: {{ $worker.gpus | default 0 }}
    labels: {{- $worker.labels | default dict | toYaml | nindent 6 }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* Ray's CPUs of a pod, as KubeRay counts them: its limit, else its request, made whole. */}}
{{- define "graft.cpus" -}}
{{- $limits := .resources.limits | default dict }}
{{- $requests := .resources.requests | default dict }}
{{- $cpu := toString (get $limits "cpu" | default (get $requests "cpu") | default "1") }}
{{- if hasSuffix "m" $cpu }}{{ ceil (divf (trimSuffix "m" $cpu) 1000) }}{{ else }}{{ ceil $cpu }}{{ end }}
{{- end }}

{{/* Bring base models of the hub to the state before a process that needs them starts; do nothing where they are there.
Called with (list $ bases). */}}
{{- define "graft.pull" -}}
{{- $ := index . 0 }}
{{- with index . 1 }}
initContainers:
  {{- range $index, $base := . }}
  - name: pull-base-model{{ if $index }}-{{ add1 $index }}{{ end }}
    image: {{ include "graft.image" (list $ $.Values.images.ray) }}
    imagePullPolicy: {{ $.Values.images.pullPolicy }}
    command: [python, -m, graft.cli.main, models, pull, {{ $base | quote }}]
    env: {{- include "graft.env" $ | nindent 6 }}
      {{- with $.Values.hub.existingTokenSecret }}
      - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: token}}}
      {{- end }}
      {{- with $.Values.hub.endpoint }}
      - {name: HF_ENDPOINT, value: {{ . | quote }}}
      {{- end }}
      {{- include "graft.moreEnv" (list $ dict) | nindent 6 }}
    securityContext: {{- include "graft.containerSecurity" $ | nindent 6 }}
    resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {memory: 2Gi}}
    volumeMounts: {{- include "graft.stateMounts" $ | nindent 6 }}
      - {name: settings, mountPath: /etc/graft, readOnly: true}
  {{- end }}
{{- end }}
{{- end }}

{{/* Base models of the catalogue that are on the hub, the first one first; as a JSON list. */}}
{{- define "graft.hubBases" -}}
{{- $bases := list }}
{{- range $base, $entry := .Values.catalog }}
{{- if hasKey $entry "hub" }}{{ $bases = ternary (prepend $bases $base) (append $bases $base) (eq $base $.Values.baseModel) }}{{ end }}
{{- end }}
{{- toJson $bases }}
{{- end }}

{{/* A worker's resources, with its GPUs. Called with values that hold resources, gpus and gpuResource. */}}
{{- define "graft.rayResources" -}}
{{- $resources := deepCopy .resources }}
{{- if gt (int .gpus) 0 }}
{{- $_ := set $resources "limits" (merge (dict (.gpuResource | default "nvidia.com/gpu") (int .gpus)) (get $resources "limits" | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
