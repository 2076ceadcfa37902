{{/* One check: a Job with a pod for each node. Takes root, check (its name), weight (its place), and container. */}}
{{- define "smoke.job" -}}
{{- $values := .root.Values -}}
{{- $labels := dict "app.kubernetes.io/name" .root.Chart.Name "app.kubernetes.io/instance" .root.Release.Name "app.kubernetes.io/component" .check -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "smoke.name" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- toYaml $labels | nindent 4 }}
    app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  annotations:
    helm.sh/hook: test
    helm.sh/hook-weight: {{ .weight | quote }}
    # The last run stays, with its pods' logs, until the next one.
    helm.sh/hook-delete-policy: before-hook-creation
spec:
  completionMode: Indexed
  completions: {{ int64 $values.nodes }}
  parallelism: {{ int64 $values.nodes }}
  # For each node by itself: one that fails ends no other's check, and no other's log is lost.
  backoffLimitPerIndex: {{ int64 $values.backoffLimit }}
  activeDeadlineSeconds: {{ int64 $values.activeDeadlineSeconds }}
  template:
    metadata:
      labels:
        {{- toYaml $labels | nindent 8 }}
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      {{- with $values.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      {{- with $values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if gt (int $values.nodes) 1 }}
      affinity:
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: kubernetes.io/hostname
              labelSelector:
                matchLabels:
                  {{- toYaml $labels | nindent 18 }}
      {{- end }}
      {{- with $values.podSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .check }}
          image: {{ include "smoke.image" $values.image | quote }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          {{- with .container }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
          # What went wrong is in the pod's status as well.
          terminationMessagePolicy: FallbackToLogsOnError
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          {{- with $values.securityContext }}
          securityContext:
            {{- toYaml . | nindent 12 }}
          {{- end }}
{{- end -}}

{{/* A Job's name: its pods have it in a label, which takes 63 characters. */}}
{{- define "smoke.name" -}}
{{ .root.Release.Name | trunc 40 | trimSuffix "-" }}-{{ .check }}
{{- end -}}

{{- define "smoke.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}
