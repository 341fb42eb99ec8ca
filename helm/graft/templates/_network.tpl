{{/* Rules of NetworkPolicies: who may be asked, and by whom. */}}
{{- define "graft.peer" -}}
podSelector: {{ include "graft.match" . }}
{{- end }}

{{- define "graft.policyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "graft.fullname" (index . 0) }}-{{ index . 1 }}
  labels: {{- include "graft.labels" . | nindent 4 }}
{{- end }}

{{/* What lies outside of the release: (list to port), the first with cidrs and peers. */}}
{{- define "graft.outside" }}
- to:
    {{- range (index . 0).cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
    {{- with (index . 0).peers }}{{ toYaml . | nindent 4 }}{{ end }}
  ports: [{port: {{ index . 1 }}, protocol: TCP}]
{{- end }}

{{/* The port of a URL. */}}
{{- define "graft.urlPort" -}}
{{- $parts := urlParse . }}
{{- if regexMatch ":[0-9]+$" $parts.host }}{{ regexFind "[0-9]+$" $parts.host }}{{ else }}{{ ternary 80 443 (eq $parts.scheme "http") }}{{ end }}
{{- end }}

{{- define "graft.databaseEgress" }}
{{- if not .Values.database.existingSecret }}
{{- include "graft.arrow" (list . "postgresql" 5432) }}
{{- else }}
{{- include "graft.outside" (list .Values.networkPolicy.database .Values.networkPolicy.database.port) }}
{{- end }}
{{- end }}

{{- define "graft.storageEgress" }}
{{- if eq .Values.storage.kind "s3" }}
{{- include "graft.outside" (list .Values.networkPolicy.storage (.Values.networkPolicy.storage.port | default (include "graft.urlPort" .Values.storage.s3.endpointUrl))) }}
{{- end }}
{{- end }}

{{/* Of those that fetch base models: (list $ bases). */}}
{{- define "graft.hubEgress" }}
{{- if index . 1 }}
{{- include "graft.outside" (list (dict "cidrs" (list "0.0.0.0/0")) (include "graft.urlPort" (index . 0).Values.hub.endpoint)) }}
{{- end }}
{{- end }}

{{- define "graft.arrow" }}
- to:
    - {{- include "graft.peer" (list (index . 0) (index . 1)) | nindent 6 }}
  ports: [{port: {{ index . 2 }}, protocol: TCP}]
{{- end }}

{{- define "graft.inArrow" }}
- from:
    {{- range index . 1 }}
    - {{- include "graft.peer" (list (index $ 0) .) | nindent 6 }}
    {{- end }}
  ports: [{port: {{ index . 2 }}, protocol: TCP}]
{{- end }}

{{- define "graft.operatorIngress" }}
- from:
    - namespaceSelector: {{- toYaml .Values.networkPolicy.operatorNamespace | nindent 8 }}
  ports: [{port: 8265, protocol: TCP}, {port: 8000, protocol: TCP}, {port: 52365, protocol: TCP}]
{{- end }}

{{- define "graft.metricsIngress" }}
{{- with .Values.networkPolicy.monitoringNamespace }}
- from:
    - namespaceSelector: {{- toYaml . | nindent 8 }}
  ports: [{port: 8080, protocol: TCP}]
{{- end }}
{{- end }}

{{- define "graft.withinCluster" }}
- {{ index . 2 }}:
    - {{- include "graft.peer" (list (index . 0) (index . 1)) | nindent 6 }}
{{- end }}
