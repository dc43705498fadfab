//! `docs/configuration.md`, generated from the configuration structs: keys, types and defaults are
//! those that serde reads, and the texts are the docs of fields and variants.

use std::collections::BTreeMap;
use std::fmt::Write;

use bireme_tools::measure::Measure;
use bireme_tools::scaling::TableLayout;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

use super::{Config, SECTIONS};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");

/// Sets the test to write the page instead of comparing it.
const UPDATE: &str = "UPDATE_DOCS";

const HEAD: &str = "# Configuration

<!-- Generated from the configuration structs; do not edit. To regenerate:
UPDATE_DOCS=1 cargo test --workspace configuration_page -->

A run has one TOML file; [`configs/`](../configs) has complete ones. `--set section.key=value`
overrides a key at any depth and may be repeated. An unknown key is refused, with the nearest key
that exists. `RUN/config.toml` holds the resolved configuration, with every default filled in.

A key whose type is a table with `kind` is written
`loss = { kind = \"sampled\", n_negatives = 4096 }`
or as a table of its own, `[train.loss]`. Its other keys depend on `kind`.

[Models and losses](models-and-losses.md) explains the choices.
";

#[test]
fn the_configuration_page_matches_the_structs() {
    let page = Page::new().text;
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(PATH, &page).unwrap();
    }
    let found = std::fs::read_to_string(PATH).unwrap_or_default();
    assert!(
        found == page,
        "docs/configuration.md differs from the configuration structs; regenerate it with \
         `{UPDATE}=1 cargo test --workspace configuration_page`"
    );
}

/// The page so far, and the tables that are still to be written below the current section.
struct Page {
    definitions: Map<String, Value>,
    text: String,
    /// By key, so that a table which several kinds of a section share is written once.
    pending: BTreeMap<String, Value>,
}

impl Page {
    fn new() -> Self {
        let root = schemars::schema_for!(Config).to_value();
        let definitions = root["$defs"].as_object().unwrap().clone();
        let mut page = Self { definitions, text: HEAD.to_owned(), pending: BTreeMap::new() };
        for section in SECTIONS {
            let schema = page.table_type(&root["properties"][section]);
            writeln!(page.text, "\n## `[{section}]`").unwrap();
            page.table(section, &schema);
            while let Some((key, schema)) = page.pending.pop_first() {
                writeln!(page.text, "\n### `{key}`").unwrap();
                page.table(&key, &schema);
            }
        }
        page
    }

    /// Replaces references by what they refer to; the keys beside a reference take precedence.
    fn resolve(&self, schema: &Value) -> Value {
        let mut merged = schema.as_object().cloned().unwrap_or_default();
        let not_null = |option: &&Value| option["type"] != "null";
        if let Some(Value::Array(options)) = merged.remove("anyOf")
            && let Some(some) = options.iter().find(not_null)
        {
            merge(&mut merged, self.resolve(some));
        }
        if let Some(reference) = merged.remove("$ref") {
            let name = reference.as_str().unwrap().rsplit('/').next().unwrap();
            merge(&mut merged, self.resolve(&self.definitions[name]));
        }
        Value::Object(merged)
    }

    /// Writes the keys of a struct, or of each kind of an enum.
    fn table(&mut self, path: &str, schema: &Value) {
        writeln!(self.text, "\n{}", wrapped(&section_doc(schema))).unwrap();
        let Some(Value::Array(kinds)) = schema.get("oneOf") else {
            self.keys(path, schema);
            return;
        };
        for kind in kinds {
            let kind = self.resolve(kind);
            let name = &kind["properties"]["kind"]["const"];
            let text = wrapped(&format!("**`kind = {name}`**: {}", doc(&kind)));
            writeln!(self.text, "\n{text}").unwrap();
            self.keys(path, &kind);
        }
    }

    fn keys(&mut self, path: &str, schema: &Value) {
        let keys = schema["properties"].as_object().cloned().unwrap_or_default();
        let keys: Vec<(String, Value)> =
            keys.into_iter().filter(|(_, of_key)| of_key.get("const").is_none()).collect();
        if keys.is_empty() {
            return;
        }
        self.text.push_str("\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n");
        for (name, of_key) in keys {
            let resolved = self.resolve(&of_key);
            let mut meaning = doc(&resolved);
            for (value, text) in names(&resolved) {
                write!(meaning, "<br>{value}: {text}").unwrap();
            }
            let key = format!("{path}.{name}");
            let is_required = schema["required"]
                .as_array()
                .is_some_and(|keys| keys.contains(&name.clone().into()));
            let default = match of_key.get("default") {
                Some(default) => self.default(&resolved, default),
                None if is_required => "required".to_owned(),
                None => "absent".to_owned(),
            };
            let kind = type_name(&resolved);
            writeln!(self.text, "| `{key}` | {kind} | {default} | {meaning} |").unwrap();
            if kind == "table" {
                let table = self.table_type(&of_key);
                self.pending.entry(key).or_insert(table);
            }
        }
    }

    /// The type of a key that is a table, with the doc of the type instead of the field's.
    fn table_type(&self, of_key: &Value) -> Value {
        // An optional table is one of two options, of which the other is null.
        let options = of_key["anyOf"].as_array().into_iter().flatten();
        let reference = options.chain([of_key]).find_map(|option| option.get("$ref"));
        self.resolve(&serde_json::json!({ "$ref": reference }))
    }

    /// A default as TOML. Of a table of fixed keys, only what differs from the keys' own defaults.
    fn default(&self, schema: &Value, default: &Value) -> String {
        let mut default = default.clone();
        if let (Value::Object(keys), Some(properties)) = (&mut default, schema.get("properties")) {
            keys.retain(|key, value| properties[key.as_str()].get("default") != Some(value));
            if keys.is_empty() {
                return "its keys' defaults".to_owned();
            }
        }
        if default.is_null() {
            return "absent".to_owned();
        }
        format!("`{}`", inline(&default))
    }
}

fn merge(into: &mut Map<String, Value>, from: Value) {
    let Value::Object(from) = from else { return };
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Object(inner)), value @ Value::Object(_)) => merge(inner, value),
            (Some(Value::Array(inner)), Value::Array(more)) => inner.extend(more),
            (Some(_), _) => {}
            (None, value) => _ = into.insert(key, value),
        }
    }
}

/// A value as TOML; of a table `kind` comes first.
fn inline(value: &Value) -> String {
    let Value::Object(keys) = value else {
        return toml::Value::try_from(value).unwrap().to_string();
    };
    let (kind, others): (Vec<_>, Vec<_>) = keys.iter().partition(|(key, _)| *key == "kind");
    let pairs =
        kind.into_iter().chain(others).map(|(key, value)| format!("{key} = {}", inline(value)));
    format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
}

/// A doc on one line.
fn doc(schema: &Value) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The doc of a type without the key that its heading already names.
fn section_doc(schema: &Value) -> String {
    let doc = doc(schema);
    let named = ["Section `[", "`[", "`model", "`train"].iter().any(|start| doc.starts_with(start));
    let text = doc.split_once("`: ").filter(|_| named).map_or(doc.as_str(), |(_, text)| text);
    let (first, rest) = text.split_at(text.chars().next().map_or(0, char::len_utf8));
    format!("{}{rest}", first.to_uppercase())
}

/// The schema of a [`Measure`], which is in a package without schemars.
pub(super) fn measures(_: &mut SchemaGenerator) -> Schema {
    schema_of_names(Measure::ALL.map(|measure| (measure.key(), format!("{}.", measure.title()))))
}

/// The schema of a [`TableLayout`], which is in a package without schemars.
pub(super) fn table_layouts(_: &mut SchemaGenerator) -> Schema {
    schema_of_names(TableLayout::ALL.map(|layout| {
        let description = match layout {
            TableLayout::Replicated => "Every rank holds the whole table.",
            TableLayout::Sharded => {
                "Every rank holds a shard of the rows: memory falls with the number of ranks, and \
                 traffic does not grow with the catalogue."
            }
        };
        (layout.name(), description.to_owned())
    }))
}

/// The schema of an enum with these names and docs.
fn schema_of_names<const N: usize>(names: [(&str, String); N]) -> Schema {
    let values = names.map(|(name, description)| {
        json!({ "type": "string", "const": name, "description": description })
    });
    json_schema!({ "oneOf": values.to_vec() })
}

/// The values of an enum of names, as TOML, with their docs.
fn names(schema: &Value) -> Vec<(String, String)> {
    let values = schema["oneOf"].as_array().into_iter().flatten();
    let values = values.filter(|value| value["type"] == "string");
    values.map(|value| (format!("`{}`", value["const"]), doc(value))).collect()
}

fn type_name(schema: &Value) -> String {
    let is_table = |schema: &Value| schema.get("properties").is_some();
    let kinds = schema["oneOf"].as_array();
    if is_table(schema) || kinds.is_some_and(|kinds| kinds.iter().any(is_table)) {
        return "table".to_owned();
    }
    if kinds.is_some() {
        return "string".to_owned();
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        one => Vec::from_iter(one.as_str()),
    };
    match types.into_iter().find(|&name| name != "null") {
        Some("array") => "list of strings".to_owned(),
        Some(name) => name.to_owned(),
        None => panic!("a key of no type: {schema}"),
    }
}

/// Text in lines of at most 100 columns.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().unwrap();
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > 100 {
            lines.push(word.to_owned());
        } else {
            *line = [line.as_str(), word].join(if line.is_empty() { "" } else { " " });
        }
    }
    lines.join("\n")
}
