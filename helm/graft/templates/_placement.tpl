{{/* Which nodes could hold what is asked of them, as graft/domain/placement.py has it. Nodes are dicts of the group's `name`,
their `count`, `cpus`, `gpus` and `labels`; selectors are Ray's: value, !value, in(a, b), !in(a, b). */}}

{{- define "graft.trainingNodes" -}}
{{- $nodes := list }}
{{- range $name, $group := .Values.training.workerGroups }}
{{- if and $group.enabled (gt (int $group.maxReplicas) 0) }}
{{- $nodes = append $nodes (dict "count" $group.maxReplicas "cpus" (include "graft.cpus" $group | float64) "gpus" ($group.gpus | default 0) "labels" ($group.labels | default dict)) }}
{{- end }}
{{- end }}
{{- toJson $nodes }}
{{- end }}

{{- define "graft.engineGroups" -}}
{{- merge (dict "engines" .Values.inference.workers) .Values.inference.workerGroups | toJson }}
{{- end }}

{{- define "graft.engineNodes" -}}
{{- $nodes := list }}
{{- range $name, $group := include "graft.engineGroups" . | fromJson }}
{{- $nodes = append $nodes (dict "count" ($group.replicas | default 1) "cpus" (include "graft.cpus" $group | float64) "gpus" ($group.gpus | default 0) "labels" ($group.labels | default dict)) }}
{{- end }}
{{- toJson $nodes }}
{{- end }}

{{/* Those whose labels pass: (list nodes selectors). */}}
{{- define "graft.suiting" -}}
{{- $suiting := list }}
{{- $selectors := index . 1 | default dict }}
{{- range $node := index . 0 }}
{{- $passes := true }}
{{- range $label, $selector := $selectors }}
{{- $wanted := list (trimPrefix "!" $selector) }}
{{- if hasPrefix "in(" (first $wanted) }}{{ $wanted = first $wanted | trimPrefix "in(" | trimSuffix ")" | replace " " "" | splitList "," }}{{ end }}
{{- if eq (has (get $node.labels $label) $wanted) (hasPrefix "!" $selector) }}{{ $passes = false }}{{ end }}
{{- end }}
{{- if $passes }}{{ $suiting = append $suiting $node }}{{ end }}
{{- end }}
{{- toJson $suiting }}
{{- end }}

{{/* How many fit on the nodes, a billion where nothing is asked for: (list nodes asked). */}}
{{- define "graft.room" -}}
{{- $asked := index . 1 }}
{{- $room := 0 }}
{{- range $node := include "graft.suiting" (list (index . 0) $asked.labelSelector) | fromJsonArray }}
{{- $each := 1000000000 }}
{{- range $resource := list "cpus" "gpus" }}
{{- $amount := get $asked $resource | default 0 | float64 }}
{{- if gt $amount 0.0 }}{{ $each = min $each (floor (divf (addf (get $node $resource) 0.000001) $amount)) }}{{ end }}
{{- end }}
{{- $room = add $room (mul $node.count $each) }}
{{- end }}
{{- $room }}
{{- end }}

{{/* Of a GPU, what a job's worker asks for: what is set, else one where there are groups with some that it may be on. */}}
{{- define "graft.workerGpus" -}}
{{- if kindIs "invalid" .Values.training.worker.gpus }}
{{- $gpus := 0 }}
{{- range include "graft.suiting" (list (include "graft.trainingNodes" . | fromJsonArray) .Values.training.worker.labelSelector) | fromJsonArray }}
{{- if gt (int .gpus) 0 }}{{ $gpus = 1 }}{{ end }}
{{- end }}
{{- $gpus }}
{{- else }}{{ .Values.training.worker.gpus }}
{{- end }}
{{- end }}

{{/* The same of an engine: where `workers` have some. */}}
{{- define "graft.replicaGpus" -}}
{{- if kindIs "invalid" .Values.inference.replica.gpus }}{{ ternary 1 0 (gt (int .Values.inference.workers.gpus) 0) }}
{{- else }}{{ .Values.inference.replica.gpus }}
{{- end }}
{{- end }}

{{/* In words, such as `1 CPU, 0.5 GPU and the labels pool=large`. */}}
{{- define "graft.asked" -}}
{{- $labels := list }}
{{- range $label, $selector := .labelSelector }}{{ $labels = append $labels (printf "%s=%s" $label $selector) }}{{ end }}
{{- printf "%v CPU, %v GPU" (.cpus | default 0) (.gpus | default 0) }}{{ with $labels }} and the labels {{ join ", " . }}{{ end }}
{{- end }}

{{/* Pools with the path of each as its name: (list path pools). */}}
{{- define "graft.prefixed" -}}
{{- $found := dict }}
{{- $path := index . 0 }}
{{- range $name, $pool := index . 1 }}{{ $_ := set $found (printf "%s.%s" $path $name) $pool }}{{ end }}
{{- toJson $found }}
{{- end }}
