"""Chat templates in the styles of model families, shortened to what makes each of them special."""

#: Refuses nothing, and writes tools and calls of tools (Llama 3.1).
LLAMA = """\
{{- bos_token }}
{%- if tools %}{{- '<|system|>' + tools | tojson + '</s>' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'tool' %}{{- '<|ipython|>' + m.content + '</s>' }}
  {%- elif m.tool_calls %}
    {{- '<|assistant|>' }}
    {%- for call in m.tool_calls %}{{- call.function | tojson }}{% endfor %}{{- '</s>' }}
  {%- else %}{{- '<|' + m.role + '|>' + m.content | trim + '</s>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

#: Leaves the reasoning out of all turns before the last question (Qwen 3).
QWEN = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
    {%- set thought = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip('\\n')
        if '</think>' in m.content or m.reasoning_content else '' %}
    {{- '<|assistant|>\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '</s>' }}
  {%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '</s>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

_ALTERNATE = """\
{%- for m in rest %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate') }}
  {%- endif %}
{%- endfor %}"""

#: Refuses the role system, and neighbouring messages of one role (Gemma).
GEMMA = (
    """\
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- set rest = messages %}"""
    + _ALTERNATE
    + """
{{- bos_token }}
{%- for m in messages %}
  {{- '<|' + ('model' if m.role == 'assistant' else m.role) + '|>' + m.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|model|>' }}{% endif %}"""
)

_MISTRAL = (
    """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if system else messages %}"""
    + _ALTERNATE
    + """
{{- bos_token }}
{%- set ns = namespace(last=0) %}
{%- for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in rest %}
  {%- if m.role == 'user' %}{{- '[INST]' + (system + ' ' if system and WHERE else '') + m.content + '[/INST]' }}
  {%- else %}{{- ' ' + m.content + eos_token }}
  {%- endif %}
{%- endfor %}"""
)
#: Refuses neighbouring messages of one role, and writes the system's text into the last turn of the user (Mistral).
MISTRAL = _MISTRAL.replace("WHERE", "loop.index0 == ns.last")
#: The same, but the last turn counts only while nothing follows it, so the answer changes the text before it.
EARLY_MISTRAL = _MISTRAL.replace("WHERE", "loop.last")

#: Opens the reasoning in the prompt and leaves it out of all answers (DeepSeek R1).
R1 = """\
{%- for m in messages %}
  {%- if m.role == 'assistant' %}{{- '<|assistant|>' + m.content.split('</think>')[-1] + '</s>' }}
  {%- else %}{{- '<|' + m.role + '|>' + m.content }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{% endif %}"""

#: Writes the end of text after the last message (Phi 3).
PHI = """\
{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% else %}{{- eos_token }}{% endif %}"""

#: Marks the answers (SmolLM 3).
MARKED = """\
{{- bos_token }}
{%- for m in messages %}
  {{- '<|' + m.role + '|>' }}
  {%- if m.role == 'assistant' %}{% generation %}{{- m.content + '</s>' }}{% endgeneration %}
  {%- else %}{{- m.content + '</s>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
