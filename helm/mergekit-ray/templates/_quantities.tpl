{{/* Bytes of a Kubernetes quantity such as 16Gi, without a fraction of a byte. */}}
{{- define "mergekit-ray.bytes" -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 }}
{{- $text := toString . }}
{{- /* Numbers in YAML arrive as floats, which print as 1.7179869184e+10. */}}
{{- if kindIs "float64" . }}{{ $text = printf "%.0f" . }}{{ end }}
{{- $number := regexFind "^[0-9.]+" $text }}
{{- $unit := trimPrefix $number $text }}
{{- printf "%d" (int64 (mulf (float64 $number) (get $units $unit))) }}
{{- end }}

{{/* Memory of a pod that workers share, for Ray's scheduler; empty without a limit. */}}
{{- define "mergekit-ray.workMemory" -}}
{{- $limit := dig "limits" "memory" "" .resources }}
{{- if $limit }}
{{- $bytes := sub (include "mergekit-ray.bytes" $limit | int64) (include "mergekit-ray.bytes" .reserved | int64) }}
{{- if le $bytes 0 }}
{{- fail (printf "workerGroups.%s: the memory limit %v leaves nothing for work after ray.reservedMemory %v; raise resources.limits.memory" .name $limit .reserved) }}
{{- end }}
{{- printf "%d" $bytes }}
{{- end }}
{{- end }}
