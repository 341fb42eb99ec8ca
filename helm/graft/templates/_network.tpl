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

{{- define "graft.databaseEgress" }}
{{- if not .Values.database.existingSecret }}
{{- include "graft.arrow" (list . "postgresql" 5432) }}
{{- else }}
- to: {{- range .Values.networkPolicy.database.cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
  ports: [{port: {{ .Values.networkPolicy.database.port }}, protocol: TCP}]
{{- end }}
{{- end }}

{{- define "graft.storageEgress" }}
{{- if eq .Values.storage.kind "s3" }}
- to: {{- range .Values.networkPolicy.storage.cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
  ports: [{port: {{ .Values.networkPolicy.storage.port }}, protocol: TCP}]
{{- end }}
{{- end }}

{{- define "graft.hubEgress" }}
{{- if hasKey (get .Values.catalog .Values.baseModel | default dict) "hub" }}
- to: [{ipBlock: {cidr: 0.0.0.0/0}}]
  ports: [{port: 443, protocol: TCP}]
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
