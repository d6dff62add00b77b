{{- define "mergekit-ray.ownPods" -}}
- podSelector:
    matchLabels:
      {{- include "mergekit-ray.selectorLabels" . | nindent 6 }}
{{- end }}

{{- define "mergekit-ray.tcpPorts" -}}
{{- range $i, $port := . }}
{{- if $i }}
{{ end -}}
- port: {{ int $port }}
  protocol: TCP
{{- end }}
{{- end }}

{{- define "mergekit-ray.urlPort" -}}
{{- $url := urlParse . }}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- default (eq $url.scheme "https" | ternary "443" "80") $port }}
{{- end }}

{{- define "mergekit-ray.storesRule" -}}
{{- $stores := .Values.networkPolicy.stores }}
{{- $ports := list }}
{{- range $stores.ports }}{{ $ports = append $ports (toString (int .)) }}{{ end }}
{{- range list .Values.s3.endpoint .Values.hub.endpoint }}
{{- if . }}{{ $ports = append $ports (include "mergekit-ray.urlPort" .) }}{{ end }}
{{- end -}}
ports:
  {{- include "mergekit-ray.tcpPorts" (uniq $ports) | nindent 2 }}
to:
  {{- if $stores.to }}
  {{- toYaml $stores.to | nindent 2 }}
  {{- else }}
  - ipBlock:
      cidr: 0.0.0.0/0
      except: [169.254.0.0/16]
  - ipBlock:
      cidr: ::/0
      except: [fe80::/10]
  {{- end }}
{{- end }}

{{- define "mergekit-ray.existingClusterRule" -}}
ports:
  {{- include "mergekit-ray.tcpPorts" (list (include "mergekit-ray.urlPort" (include "mergekit-ray.dashboardAddress" .))) | nindent 2 }}
{{- with .Values.existingCluster.name }}
to:
  - podSelector:
      matchLabels:
        ray.io/cluster: {{ . }}
{{- end }}
{{- end }}
