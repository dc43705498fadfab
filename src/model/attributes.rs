//! Features that describe an item, such as its category, as its last event has them.

use tch::Tensor;

use crate::data::{Catalogue, Column, Features, Sessions};

/// The tag of features that describe the time of an event.
const TIME_TAG: &str = "time";

/// The attributes of all items.
#[derive(Default)]
pub(super) struct Attributes(pub Vec<Attribute>);

/// An attribute of all items.
pub(super) struct Attribute {
    /// Number of the column in [`Features::columns`].
    pub column: usize,
    pub name: String,
    pub cells: Cells,
}

/// The attribute of each item, `[V]`.
pub(super) enum Cells {
    /// Codes from 1; 0 if the item has not occurred.
    Codes(Vec<i64>),
    /// 0 if the item has not occurred.
    Values(Vec<f32>),
}

/// Numbers in [`Features::columns`] of the features `names`, or of all that do not describe the
/// time of an event. `key`: of the configuration, for the message.
///
/// # Errors
/// A name is not among the features.
pub(super) fn attribute_columns(
    names: Option<&[String]>,
    key: &str,
    features: &Features,
) -> Result<Vec<usize>, String> {
    let columns = features.columns().iter().enumerate().skip(1);
    let Some(names) = names else {
        let of_items = columns.filter(|(_, feature)| !feature.has_tag(TIME_TAG));
        return Ok(of_items.map(|(column, _)| column).collect());
    };
    let column = |name: &String| {
        let column = columns.clone().find(|(_, feature)| feature.name == *name);
        column
            .map(|(column, _)| column)
            .ok_or_else(|| format!("`{key}` has `{name}`: it is not in `data.features`"))
    };
    names.iter().map(column).collect()
}

impl Attributes {
    /// The attributes in the columns `columns` of the features, of no item yet.
    pub fn new(columns: Vec<usize>, features: &Features) -> Self {
        let n_items = features.n_items() as usize;
        let attribute = |column: usize| {
            let feature = &features.columns()[column];
            let cells = if feature.is_categorical() {
                Cells::Codes(vec![0; n_items])
            } else {
                Cells::Values(vec![0.0; n_items])
            };
            Attribute { column, name: feature.name.clone(), cells }
        };
        Self(columns.into_iter().map(attribute).collect())
    }

    /// Number of attributes with codes.
    pub fn n_codes(&self) -> usize {
        self.0.iter().filter(|attribute| matches!(attribute.cells, Cells::Codes(_))).count()
    }

    /// Takes the attributes of a session's items from its events.
    pub fn add(&mut self, sessions: &Sessions, row: usize) {
        let items = sessions.ids(0, row);
        for Attribute { column, cells, .. } in &mut self.0 {
            match cells {
                Cells::Codes(codes) => {
                    for (&item, &code) in items.iter().zip(sessions.ids(*column, row)) {
                        codes[item as usize] = code;
                    }
                }
                Cells::Values(values) => {
                    for (&item, &value) in items.iter().zip(sessions.values(*column, row)) {
                        values[item as usize] = value;
                    }
                }
            }
        }
    }

    /// Takes the attributes of items that have none yet from the catalogue.
    pub fn fill(&mut self, catalogue: &Catalogue) {
        for Attribute { column, cells, .. } in &mut self.0 {
            match (cells, catalogue.column(*column)) {
                (Cells::Codes(codes), Some(Column::Ids(ids))) => {
                    fill(codes, catalogue.items(), ids);
                }
                (Cells::Values(values), Some(Column::Values(of_items))) => {
                    fill(values, catalogue.items(), of_items);
                }
                _ => {}
            }
        }
    }

    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor)> {
        self.0.iter().map(|attribute| {
            let cells = match &attribute.cells {
                Cells::Codes(codes) => Tensor::from_slice(codes),
                Cells::Values(values) => Tensor::from_slice(values),
            };
            (tensor_name(&attribute.name), cells)
        })
    }

    /// Restores what [`Attributes::tensors`] returned; `find` gives a tensor by its name.
    ///
    /// # Errors
    /// A tensor is missing, of another type, or of more items.
    pub fn load<'t>(
        &mut self,
        find: impl Fn(&str) -> Result<&'t Tensor, String>,
        n_items: usize,
    ) -> Result<(), String> {
        for attribute in &mut self.0 {
            let name = tensor_name(&attribute.name);
            let tensor = find(&name)?.reshape([-1]);
            if tensor.size()[0] as usize > n_items {
                return Err(format!("`{name}` has {} items, not {n_items}", tensor.size()[0]));
            }
            let problem = |error| format!("tensor `{name}`: {error}");
            match &mut attribute.cells {
                Cells::Codes(codes) => {
                    *codes = Vec::try_from(tensor).map_err(problem)?;
                    codes.resize(n_items, 0);
                }
                Cells::Values(values) => {
                    *values = Vec::try_from(tensor).map_err(problem)?;
                    values.resize(n_items, 0.0);
                }
            }
        }
        Ok(())
    }
}

/// Sets the cells of `items` that are 0 to `values`.
fn fill<T: Copy + Default + PartialEq>(cells: &mut [T], items: &[i64], values: &[T]) {
    for (&item, &value) in items.iter().zip(values) {
        let cell = &mut cells[item as usize];
        if *cell == T::default() {
            *cell = value;
        }
    }
}

fn tensor_name(attribute: &str) -> String {
    format!("attributes.{attribute}")
}
