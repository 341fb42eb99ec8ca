{{/* graft.yaml of each process. */}}

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

{{/* What Ray Serve is told of inference. */}}
{{- define "graft.serveConfig" -}}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options:
  port: 9000
  grpc_servicer_functions: [graft.internal.v1.engine_pb2_grpc.add_EngineServicer_to_server]
logging_config: {enable_access_log: false, log_level: WARNING}
applications:
  - name: graft-engine
    route_prefix: /
    import_path: graft.serving.declared:application
    args:
      home: /var/lib/graft
      tracking_uri: {{ include "graft.mlflowUri" . }}
      serving: {{- omit (include "graft.serving" . | fromYaml) "address" | toYaml | nindent 8 }}
      {{- with (include "graft.sharedSettings" . | fromYaml).storage }}
      storage: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
