{{/* What the schema cannot express: values that contradict each other. */}}
{{- define "mergekit-ray.checks" -}}
{{- $recipe := .Values.recipe }}
{{- if and $recipe.content $recipe.existingConfigMap }}
{{- fail "recipe.content and recipe.existingConfigMap are both set; give one" }}
{{- else if not (or $recipe.content $recipe.existingConfigMap) }}
{{- fail "no recipe: give its YAML with --set-file recipe.content=recipe.yml, or the name of a ConfigMap as recipe.existingConfigMap" }}
{{- end }}
{{- include "mergekit-ray.checkRecipe" . }}
{{- if eq .Values.mode "existing-cluster" }}
{{- $cluster := .Values.existingCluster }}
{{- if and $cluster.name $cluster.address }}
{{- fail "existingCluster.name and existingCluster.address are both set; give one" }}
{{- else if not (or $cluster.name $cluster.address) }}
{{- fail "mode existing-cluster needs existingCluster.name (a RayCluster of this namespace) or existingCluster.address (a Ray dashboard)" }}
{{- end }}
{{- end }}
{{- if eq .Values.mode "rayjob" }}
{{- if not .Values.workerGroups }}
{{- fail "workerGroups is empty; set at least one, as the head computes nothing" }}
{{- end }}
{{- if and (eq .Values.ray.auth "token") (semverCompare "<2.52.0" .Values.ray.version) }}
{{- fail (printf "ray.auth token needs Ray 2.52.0 or newer, not %s; use a newer image, or ray.auth disabled" .Values.ray.version) }}
{{- end }}
{{- if gt (include "mergekit-ray.bytes" .Values.ray.objectStoreMemory | int64) (include "mergekit-ray.bytes" .Values.sharedMemory.sizeLimit | int64) }}
{{- fail (printf "ray.objectStoreMemory %s does not fit into sharedMemory.sizeLimit %s" .Values.ray.objectStoreMemory .Values.sharedMemory.sizeLimit) }}
{{- end }}
{{- range $name := keys .Values.workerGroups | sortAlpha }}
{{- $group := include "mergekit-ray.workerGroup" (dict "root" $ "name" $name) | fromYaml }}
{{- $replicas := include "mergekit-ray.replicas" $group | int }}
{{- if or (lt $replicas (int $group.minReplicas)) (lt (int $group.maxReplicas) $replicas) }}
{{- fail (printf "workerGroups.%s: replicas %d is not between minReplicas %d and maxReplicas %d" $name $replicas (int $group.minReplicas) (int $group.maxReplicas)) }}
{{- end }}
{{- include "mergekit-ray.checkSpot" (dict "root" $ "settings" $group "where" (printf "workerGroups.%s" $name)) }}
{{- end }}
{{- end }}
{{- if eq .Values.mode "job" }}
{{- include "mergekit-ray.checkSpot" (dict "root" . "settings" .Values.local "where" "local") }}
{{- end }}
{{- end }}

{{- define "mergekit-ray.checkSpot" -}}
{{- $spot := .root.Values.spot }}
{{- if and .settings.spot (not (or $spot.nodeSelector $spot.tolerations)) }}
{{- fail (printf "%s.spot is true, but the chart does not know your spot nodes: set spot.nodeSelector, spot.tolerations, or both" .where) }}
{{- end }}
{{- end }}

{{/* Finds the commonest mistakes in a recipe before a pod starts; mergekit-ray validate finds the others. */}}
{{- define "mergekit-ray.checkRecipe" -}}
{{- with .Values.recipe.content }}
{{- $recipes := list }}
{{- range regexSplit "(?m)^---[ \t]*$" . -1 }}
{{- $document := fromYaml . }}
{{- with $document.Error }}
{{- fail (printf "recipe.content is not a recipe: %s" .) }}
{{- end }}
{{- $recipes = append $recipes $document }}
{{- range kindIs "slice" $document.stages | ternary $document.stages list }}
{{- $recipes = append $recipes . }}
{{- end }}
{{- end }}
{{- $outputs := list $.Values.output }}
{{- $methods := list }}
{{- range $recipe := $recipes }}
{{- if kindIs "map" $recipe }}
{{- $output := $recipe.output }}
{{- if kindIs "map" $output }}{{ $output = $output.path }}{{ end }}
{{- $outputs = append $outputs $output }}
{{- $methods = append $methods $recipe.merge_method }}
{{- $methods = append $methods (kindIs "map" $recipe.backbone | ternary $recipe.backbone dict).merge_method }}
{{- end }}
{{- end }}
{{- if not (compact $outputs) }}
{{- fail "no output: set it as in --set output=s3://bucket/merged, or write `output: s3://bucket/merged` in the recipe" }}
{{- end }}
{{- $known := concat ($.Files.Get "files/methods.json" | fromJsonArray) $.Values.recipe.pluginMethods | uniq | sortAlpha }}
{{- range compact $methods }}
{{- if not (has . $known) }}
{{- fail (printf "recipe.content: unknown merge method %q; accepted: %s; if a plugin in your image adds it, list it in recipe.pluginMethods" (toString .) (join ", " $known)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
