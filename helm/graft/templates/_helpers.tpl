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

{{/* Ray's CPUs of a pod, as KubeRay counts them: its limit, else its request, made whole. */}}
{{- define "graft.cpus" -}}
{{- $limits := .resources.limits | default dict }}
{{- $requests := .resources.requests | default dict }}
{{- $cpu := toString (get $limits "cpu" | default (get $requests "cpu") | default "1") }}
{{- if hasSuffix "m" $cpu }}{{ ceil (divf (trimSuffix "m" $cpu) 1000) }}{{ else }}{{ ceil $cpu }}{{ end }}
{{- end }}

{{/* A worker's resources, with its GPUs. Called with values that hold resources, gpus and gpuResource. */}}
{{- define "graft.rayResources" -}}
{{- $resources := deepCopy .resources }}
{{- if gt (int .gpus) 0 }}
{{- $_ := set $resources "limits" (merge (dict (.gpuResource | default "nvidia.com/gpu") (int .gpus)) (get $resources "limits" | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
