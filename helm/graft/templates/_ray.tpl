{{/* Pods of Ray: (list $ component part serviceAccount), and their container: (list $ image part). */}}
{{- define "graft.rayContainer" }}
{{- $ := index . 0 }}
image: {{ index . 1 }}
imagePullPolicy: {{ $.Values.images.pullPolicy }}
env: {{- include "graft.env" $ | nindent 2 }}
  {{- include "graft.mlflowEnv" $ | nindent 2 }}
  # Where reinforcement, which reads no settings, finds it.
  - {name: GRAFT_SERVING_TOKEN_FILE, value: /etc/graft-engine/token}
  {{- range $key, $value := dict "DO_NOT_TRACK" "1" "MLFLOW_DISABLE_TELEMETRY" "true" "RAY_USAGE_STATS_ENABLED" "0" "VLLM_NO_USAGE_STATS" "1" "HF_HUB_OFFLINE" "1" "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING" "0" }}
  - {name: {{ $key }}, value: {{ $value | quote }}}
  {{- end }}
  {{- include "graft.moreEnv" (list $ (index . 2)) | nindent 2 }}
securityContext: {{- include "graft.containerSecurity" $ | nindent 2 }}
volumeMounts: {{- include "graft.stateMounts" $ | nindent 2 }}
  - {name: settings, mountPath: /etc/graft, readOnly: true}
  {{- include "graft.engineTokenMount" $ | nindent 2 }}
{{- end }}

{{- define "graft.rayPod" }}
{{- $ := index . 0 }}
{{- include "graft.pullSecrets" $ }}
serviceAccountName: {{ index . 3 | quote }}
enableServiceLinks: false
securityContext: {{- include "graft.podSecurity" $ | nindent 2 }}
{{- include "graft.placement" (index . 2) }}
volumes: {{- include "graft.stateVolumes" $ | nindent 2 }}
  - name: settings
    configMap: {name: {{ include "graft.fullname" $ }}-ray}
  {{- include "graft.engineTokenVolume" $ | nindent 2 }}
{{- end }}

{{/* As graft.podMetadata. KubeRay looks neither at tolerations nor at how many nodes inference has, and would leave the pods
as they are: they are annotations as well, at which it looks. */}}
{{- define "graft.rayMetadata" -}}
{{- $marks := index . 3 }}
{{- with (index . 2).tolerations }}{{ $marks = merge (dict "checksum/tolerations" (toJson . | sha256sum)) $marks }}{{ end }}
{{- include "graft.podMetadata" (list (index . 0) (index . 1) (index . 2) $marks) }}
{{- end }}
