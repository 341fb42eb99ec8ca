{{/* What pods have in common: metadata, security, places, variables, volumes. */}}

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
- {name: catalog, mountPath: /var/lib/graft/catalog.yaml, subPath: catalog.yaml, readOnly: true}
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

{{/* The internal gRPC's token: of those that ask it and of those that answer. */}}
{{- define "graft.engineTokenMount" -}}
- {name: engine-token, mountPath: /etc/graft-engine, readOnly: true}
{{- end }}

{{- define "graft.engineTokenVolume" -}}
- name: engine-token
  secret: {secretName: {{ include "graft.engineSecret" . | quote }}, items: [{key: token, path: token}]}
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
