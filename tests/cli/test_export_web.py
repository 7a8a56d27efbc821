def test_options_of_pages(refused, files, tmp_path):
    onnx, page = tmp_path / "plain.onnx", tmp_path / "page"
    assert "--single-file is not an option of --to onnx" in refused(
        "export", files.plain, onnx, "--to", "onnx", "--single-file"
    )
    to_web = "export", files.plain, page, "--to", "web"
    assert "There is no 'none.tgz': run 'npm pack" in refused(*to_web, "--onnxruntime-web", "none.tgz")
    assert "crop_fraction must be in (0, 1], got 2.0" in refused(*to_web, "--crop-fraction", "2")
    assert "takes square images, got 16 x 24" in refused(*to_web, "--input-size", "16", "24")


def test_a_folder_with_other_files_is_kept(refused, files, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "precious").write_text("x")
    assert "other files than an export" in refused(
        "export", files.plain, tmp_path / "page", "--to", "web", "--overwrite"
    )
