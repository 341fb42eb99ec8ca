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
