//! The table of routes as an OpenAPI 3.1 document. The schemas are made from the types that go over the wire, so that
//! neither can say what the other does not.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::routes::{Answer, ROUTES, Route};

/// The shape of all errors.
#[derive(JsonSchema)]
#[allow(
    dead_code,
    reason = "only its schema is wanted; the answer is written by `reply`"
)]
struct Error {
    /// `UNDEFINED` for requests of the incumbent's API, whose clients know no other; else what kind of error it is.
    code: String,
    /// For people: what failed, and why.
    message: String,
}

/// The document.
pub(super) fn document() -> Value {
    let mut schemas = SchemaSettings::draft2020_12()
        .with(|settings| settings.definitions_path = "/components/schemas".into())
        .into_generator();
    let error = schemas.subschema_for::<Error>();
    let mut paths: Map<String, Value> = Map::new();
    for route in &ROUTES {
        let operation = operation(route, &error, &mut schemas);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        if let Value::Object(path) = path {
            path.insert(route.method.to_ascii_lowercase(), operation);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "rafsd",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "HTTP over the Unix socket of --apisock. Paths below /api/v1 and /api/v2 are those of nydusd.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas.take_definitions(true)},
    })
}

fn operation(route: &Route, error: &schemars::Schema, schemas: &mut SchemaGenerator) -> Value {
    let parameters: Vec<Value> = route
        .query
        .iter()
        .map(|(name, required)| {
            json!({"name": name, "in": "query", "required": required, "schema": {"type": "string"}})
        })
        .collect();
    let success = match route.answer {
        Answer::Nothing => ("204", json!({"description": "done"})),
        Answer::Json(schema) => {
            let content = json!({"application/json": {"schema": schema(schemas)}});
            ("200", json!({"description": "the answer", "content": content}))
        }
        Answer::Text(kind) => {
            let content = json!({kind: {"schema": {"type": "string"}}});
            ("200", json!({"description": "the answer", "content": content}))
        }
    };
    let refused =
        json!({"description": "refused or failed", "content": {"application/json": {"schema": error}}});
    let mut operation = json!({
        "operationId": operation_id(route),
        "summary": route.summary,
        "parameters": parameters,
        "responses": {success.0: success.1, "default": refused},
    });
    if let (Some(schema), Value::Object(operation)) = (route.request, &mut operation) {
        let content = json!({"application/json": {"schema": schema(schemas)}});
        operation.insert(
            "requestBody".into(),
            json!({"required": true, "content": content}),
        );
    }
    operation
}

/// `get_api_v1_daemon`.
fn operation_id(route: &Route) -> String {
    let path = route.path.trim_matches('/').replace(['/', '.'], "_");
    format!("{}_{path}", route.method.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(members) => {
                if let Some(Value::String(reference)) = members.get("$ref") {
                    found.insert(reference);
                }
                members.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_described_and_every_reference_leads_somewhere() {
        let document = document();
        let mut identifiers = BTreeSet::new();
        for route in &ROUTES {
            let operation = &document["paths"][route.path][route.method.to_ascii_lowercase()];
            assert!(
                operation["summary"].is_string(),
                "{} {}",
                route.method,
                route.path
            );
            assert!(identifiers.insert(operation["operationId"].as_str().unwrap().to_owned()));
        }
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.contains("#/components/schemas/LiveRequest"), "{found:?}");
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let request = &document["components"]["schemas"]["LiveRequest"]["properties"];
        assert!(
            request["age_ms"]["description"]
                .as_str()
                .unwrap()
                .contains("milliseconds")
        );
    }
}
