//! The schema is written from the data, and the one beside the shared sessions is read.

use bireme_etl::{Coded, Domain, SCHEMA, SESSIONS_BY_DAY, Schema, Split, WORKFLOW, Workflow};
use polars::prelude::*;

use crate::support::{days, read, run, scratch, shared, shop};

#[test]
fn the_schema_holds_for_every_row() {
    let dir = scratch();
    run(dir.path(), &shop(400), |_| {}).unwrap();
    let out = dir.path().join("out");
    let schema = Schema::read(out.join(SCHEMA)).unwrap();
    let workflow = Workflow::load(&out.join(WORKFLOW)).unwrap();
    assert_eq!(schema.features.len(), 10);
    let item = schema.item_id().unwrap();
    assert_eq!(item.name, "product_id-list_seq");
    assert_eq!(
        item.cardinality().unwrap() as usize,
        workflow.vocabulary(Coded::Product).cardinality()
    );
    for day in days(&out) {
        for split in Split::ALL {
            let table = read(&out.join(SESSIONS_BY_DAY).join(day.to_string()).join(split.file()));
            for feature in &schema.features {
                let column = table.column(&feature.name).unwrap();
                assert_eq!(column.dtype().is_list(), feature.is_list(), "{}", feature.name);
                let values = if feature.is_list() {
                    column.list().unwrap().get_inner()
                } else {
                    column.as_materialized_series().clone()
                };
                let (min, max) = match feature.domain {
                    Domain::Int(Some(range)) => (range.min as f64, range.max as f64),
                    Domain::Float(Some(range)) => (range.min, range.max),
                    _ => panic!("{} has no range", feature.name),
                };
                let values = values.cast(&DataType::Float64).unwrap();
                for value in values.f64().unwrap().into_no_null_iter() {
                    assert!(
                        (min..=max).contains(&value),
                        "{}: {value} is not in {min}..{max}",
                        feature.name
                    );
                }
            }
        }
    }
    let again = dir.path().join("again.pbtxt");
    schema.write(&again).unwrap();
    assert_eq!(Schema::read(again).unwrap(), schema);
}

#[test]
fn the_shared_schema_is_read() {
    let Some(path) = shared("data/rees46-sessions/schema.pbtxt") else { return };
    let schema = Schema::read(path).unwrap();
    assert_eq!(schema.features.len(), 10);
    assert_eq!(schema.item_id().unwrap().cardinality(), Some(118_335));
    assert_eq!(schema.feature("brand-list_seq").unwrap().cardinality(), Some(2641));
    let session = schema.feature("user_session").unwrap();
    assert!(!session.is_list() && !session.is_categorical() && session.cardinality().is_none());
    assert!(schema.feature("et_dayofweek_cos-list_seq").unwrap().has_tag("time"));
}

#[test]
fn a_broken_schema_is_named_with_its_place() {
    let dir = scratch();
    let path = dir.path().join("broken.pbtxt");
    std::fs::write(&path, "feature {\n  name: \"a\"\n  type INT\n}\n").unwrap();
    let error = Schema::read(&path).unwrap_err().to_string();
    assert!(error.contains("broken.pbtxt`, line 3, column 8: expected ':'"), "{error}");
}

#[test]
fn a_field_that_is_not_known_is_named_with_its_line() {
    let dir = scratch();
    let path = dir.path().join("newer.pbtxt");
    std::fs::write(&path, "feature {\n  name: \"a\"\n  tpye: INT\n}\n").unwrap();
    let schema = Schema::read(&path).unwrap();
    assert!(schema.warnings[0].contains("newer.pbtxt`: ignored") && schema.warnings.len() == 1);
    assert!(schema.warnings[0].contains("`feature.tpye` (line 3)"), "{:?}", schema.warnings);
    let error = schema.features[0].check().unwrap_err().to_string();
    assert!(error.contains("newer.pbtxt`, line 1: the feature `a` has no `type`"), "{error}");
}
